"""Recognise what a file is if it is not what its name says, and tell what to do about it."""

from __future__ import annotations

import re

HEAD = 512
"""Number of bytes at the beginning of a file from which its kind is recognised."""

_SAFETENSORS = rb".{4}\x00{4}\{.*"  # the length of a header below 4 GiB, then the header
_AGAIN = "copy or download it again"
_TORCH_ZIP = rb"PK\x03\x04.{26}[^/]{1,255}/data\.pkl.*"
# protocols 2 to 5 begin with 0x80; pickles of protocol 0 and 1 with a class, a dict or a list
_PICKLE = rb"(\x80[\x02-\x05]|c[\w.]+\n[\w.]+\n|\([dl]p\d+\n|[}\])]q\x00).*"
_KINDS = (
    # first, since a header's length can have the first bytes of any other kind
    (
        _SAFETENSORS,
        "a safetensors file; if these are weights, rename it so that it ends in .safetensors",
    ),
    (rb"", f"empty; {_AGAIN}"),
    (
        rb"\x00+",
        f"only zero bytes at its beginning: its data never reached the disk; {_AGAIN}",
    ),
    (
        rb"version https://(git-lfs\.github|hawser\.github)\.com/spec/.*",
        "a Git LFS pointer, not the file itself; run `git lfs pull` in its repository",
    ),
    (
        rb"/annex/objects/.*",
        "a git-annex pointer, not the file itself; run `git annex get` in its repository",
    ),
    (
        rb"(?i:(\xef\xbb\xbf)?\s*<(!doctype|!--|html|head|body|\?xml|error).*)",
        "a web page or a server's error message that was saved in its place; download it again, "
        "logged in if it is private",
    ),
    (rb"\x1f\x8b\x08.*", "compressed with gzip; decompress it (gunzip)"),
    (rb"BZh[1-9].*", "compressed with bzip2; decompress it (bunzip2)"),
    (rb"\xfd7zXZ\x00.*", "compressed with xz; decompress it (unxz)"),
    (rb"\x28\xb5\x2f\xfd.*", "compressed with zstd; decompress it (unzstd)"),
    (rb"\x04\x22\x4d\x18.*", "compressed with lz4; decompress it (unlz4)"),
    (rb"7z\xbc\xaf\x27\x1c.*", "a 7-Zip archive; unpack it and name the checkpoint in it"),
    (rb"Rar!\x1a\x07.*", "a RAR archive; unpack it and name the checkpoint in it"),
    (rb".{257}ustar.*", "a tar archive; unpack it and name the checkpoint in it"),
    (
        rb"GGUF.*",
        "a GGUF file, which holds no NPT weights; name the checkpoint that training wrote",
    ),
    (
        rb"\x89HDF\r\n\x1a\n.*",
        "an HDF5 file, as Keras writes; name the checkpoint that training wrote",
    ),
    (rb"\x93NUMPY.*", "a NumPy array; name the checkpoint that training wrote"),
    (
        rb"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19\..*",  # torch.serialization.MAGIC_NUMBER
        "from torch before 1.6; load it with torch.load(weights_only=True) and save it again",
    ),
    (
        _PICKLE,
        "a plain pickle, which can run code and is not read; "
        "save the tensors in it with torch.save or safetensors",
    ),
    (
        _TORCH_ZIP,
        "what torch.save writes; if these are weights, rename it so that it ends in .pt",
    ),
    (rb"PK\x03\x04.*", "a zip archive; unpack it and name the checkpoint in it"),
    (rb"PK\x05\x06.*", f"an empty zip archive; {_AGAIN}"),
)


def may_be_safetensors(head: bytes) -> bool:
    """Whether a file with this beginning can be a safetensors file."""
    return bool(re.match(_SAFETENSORS, head, re.DOTALL))


def is_pickle(head: bytes) -> bool:
    """Whether a file begins like one of pickle or torch.save, and not like a safetensors file."""
    pickled = re.match(_PICKLE + b"|" + _TORCH_ZIP, head, re.DOTALL)
    return bool(pickled) and not may_be_safetensors(head)


def recognise(head: bytes) -> str:
    """Kind of a file by its first `HEAD` bytes, and what to do about it; "" if unknown.

    The text completes "the file is". Call this only for a file that could not be read as the format
    it should have: good files of other formats can begin like one of these kinds.
    """
    return next((text for begin, text in _KINDS if re.fullmatch(begin, head, re.DOTALL)), "")


def describe(head: bytes) -> str:
    """Like `recognise`; describes the beginning of a file of unknown kind."""
    if known := recognise(head):
        return known
    if head.startswith((b"\xff\xfe", b"\xfe\xff")):
        return f"UTF-16 text, which PowerShell's > makes of any file; {_AGAIN}"
    try:
        text = head.decode()
    except UnicodeDecodeError as error:
        # the head may end within a character, which has up to 4 bytes
        text = head[: error.start].decode() if error.start > HEAD - 4 else ""
    line = " ".join(text.split())
    if line.isprintable() and line:
        return f"text that begins with {line[:60]!r}; {_AGAIN}"
    return f"of an unknown kind: it begins with the bytes {head[:8].hex(' ')}"


def describe_zip(directory: bytes) -> str:
    """Kind of a zip archive that torch did not write, from its central directory."""
    if b".npy" in directory:
        return "a NumPy archive (.npz); name the checkpoint that training wrote"
    if b"model.weights.h5" in directory:
        return "a Keras model; name the checkpoint that training wrote"
    return "a zip archive without data.pkl; unpack it and name the checkpoint in it"
