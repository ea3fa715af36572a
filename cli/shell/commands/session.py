"""Commands on the state of the session: layers, base weights, settings, files, undo."""

from __future__ import annotations

from npt_fast.cli.shell import views
from npt_fast.cli.shell.command import Commands, Context, Reply, number, setting, settings
from npt_fast.cli.shell.line import Arguments
from npt_fast.errors import TransferError
from npt_fast.layer_names import chosen_layers
from npt_fast.paths import user_path
from npt_fast.schema import shown

COMMANDS = Commands()


@COMMANDS.command("layers", "[LAYERS]")
def _layers(c: Context, a: Arguments) -> Reply:
    """Show which layers are on; with 11,13, all or upper_half, turn these on, the others off."""
    session, text = c.session, a.get("LAYERS")
    if text is not None:
        from npt_fast.hf.convert import decoder_layers

        count = len(decoder_layers(session.model))
        session.activate(chosen_layers(text, session.available, count))
    on = list(session.state.layers)
    off = [layer for layer in session.available if layer not in on]
    line = f"Active layers: {on}" + (f" (off: {off})" if off else "")
    return Reply({"on": on, "off": off}, [f"✓ {line}" if text else line])


@COMMANDS.command("bake", "NAME", options=("-strength",))
def _bake(c: Context, a: Arguments) -> Reply:
    """Add the modulation to the base weights, for every token, until undo."""
    strength = number("-strength", a.options.get("strength", "1"))
    found = c.session.bake(a["NAME"], strength)
    layers = sorted(found.layers)
    return Reply(
        {"baked": a["NAME"], "strength": strength, "layers": layers},
        [f"✓ Baked '{a['NAME']}' x{strength:g} into layers {layers}; undo takes it out"],
    )


@COMMANDS.command("export-lora", "NAME DIR", log="recorded")
def _export_lora(c: Context, a: Arguments) -> Reply:
    """Write the modulation as a LoRA adapter that PEFT and vLLM load."""
    path = c.session.export_lora(a["NAME"], a["DIR"])
    rank = c.session.modulation(a["NAME"]).terms
    return Reply(
        {"path": str(path), "rank": rank}, [f"✓ Wrote '{a['NAME']}' as LoRA of rank {rank}: {path}"]
    )


@COMMANDS.command("undo")
def _undo(c: Context, a: Arguments) -> Reply:
    """Undo the last change of the shelf, the weights, layers, tokens or settings."""
    what = c.session.undo()
    return Reply({"undone": what}, [f"✓ Undone: {what}"])


@COMMANDS.command("reset")
def _reset(c: Context, a: Arguments) -> Reply:
    """Go back to the start, weights too; undo restores everything but bakes."""
    baked = c.session.bakes
    c.session.reset()
    more = f", {baked} bakes taken out" if baked else ""
    return Reply({"bakes_undone": baked}, [f"✓ Reset: the shelf is empty, all layers on{more}"])


@COMMANDS.command("set", "[KEY=VALUE...]")
def _set(c: Context, a: Arguments) -> Reply:
    """Show or set how tokens are chosen, special_tokens and chat: set seed=3 chat=true."""
    values = {}
    for pair in a.values["KEY=VALUE"]:
        key, equals, value = pair.partition("=")
        if not equals:
            raise TransferError(f"write it like set seed=3, not {shown(pair)}")
        values.update(setting(c, {"temp": "temperature"}.get(key, key), value))
    if values:
        c.session.set(**values)
    now = settings(c)
    line = ", ".join(f"{key}={value}" for key, value in now.items())
    return Reply(now, [f"✓ {line}" if values else line])


@COMMANDS.command("save", "FILE [NAME]", log="recorded")
def _save(c: Context, a: Arguments) -> Reply:
    """Write the session into a folder (safetensors and JSON), or one modulation into a file."""
    name, path = a.get("NAME"), a["FILE"]
    if name is not None:
        target = user_path(path if path.endswith(".safetensors") else f"{path}.safetensors")
        c.session.modulation(name).save(target)
        return Reply({"path": str(target)}, [f"✓ Saved modulation '{name}' to {target}"])
    target = c.session.save(path)
    count = len(c.session.state.shelf)
    lines = [f"✓ Session saved to {target} ({count} modulations)"]
    if c.session.bakes:
        lines.append("Warning: bakes into the base weights are not saved")
    return Reply({"path": str(target), "modulations": count}, lines)


@COMMANDS.command("load", "FILE")
def _load(c: Context, a: Arguments) -> Reply:
    """Load a saved session in place of this one, or a modulation's file onto the shelf."""
    before = c.session.state.reading
    names = c.session.load(a["FILE"])
    lines = [f"✓ Loaded {len(names)} modulations from {a['FILE']}: {', '.join(names)}"]
    reading = c.session.state.reading
    if reading != before:
        lines.append(f"Note: texts are read {reading} now, as in the saved session")
    for name in names:
        lines += views.other_reading(name, c.session.modulation(name), reading)
    return Reply({"loaded": names}, lines, changed=names)
