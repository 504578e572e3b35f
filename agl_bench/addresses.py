"""Addresses of servers and databases as they may be shown: without what only their owner may know."""

from __future__ import annotations

import re
import urllib.parse
from collections.abc import Iterator

MASK = "***"
# Few paths are longer; what follows costs time that grows with the square of a word's length.
_LONG_WORD = re.compile(r"(?<!\S)(\S{1000})\S{1000,}+")
# A text may quote an address: it ends at white space, at a quotation mark or at a bracket that closes.
_ADDRESS = re.compile(r"(?<![A-Za-z0-9+.\-])(?P<scheme>[A-Za-z0-9+.\-]+:/{1,2})(?P<rest>[^\s'\"`<>]+)")
_BARE = re.compile(r"(?<![^\s'\"`<>(=])[^\s'\"`<>/@:=]+:(?!/)[^\s'\"`<>]+@(?=[\w\[])")  # user:password@host
# Not `tokens`, `tokenizer`, `passes`, `pass_over` or `bypass`: a number of them is no secret.
_WORDS = r"pass(?:word|wd|phrase)|(?<!com)(?<!by)pass(?![a-z_])|pwd|secret|token(?!s|iz)|credential|signature"
_SECRET = re.compile(rf"{_WORDS}|api_?key|access_?key", re.IGNORECASE)
_NAME = re.compile(r"(?<![\w.\-])[\w.\-]++['\"]?\s*+(?:=|:(?=\s*+['\"]))\s*+")
_VALUE = re.compile(r"'(?:[^'\\]|\\.)*+'|\"(?:[^\"\\]|\\.)*+\"|[^\s&;,'\"`)]++")
_BEARER = re.compile(r"\b(?P<kind>Bearer|Basic)\s+[A-Za-z0-9+/=._\-]{8,}")
_PLAIN = {"charset", "connect_timeout", "host", "mode", "port", "sslmode", "timeout", "uri"}  # of a query: no secrets


def masked(text: object) -> str:
    """A text for people, logs and records: what may be a secret in an address or an assignment is `MASK`.

    Masked are user and password before a host, also where separators in them were not escaped; values of a query,
    but for a few that are known to tell nothing; and what is assigned to a name such as password, token or access_key.
    Rather too much is masked than too little. Words of 2,000 characters and more are cut. Bytes of a file name that are
    no UTF-8 are escaped.
    """
    shown = _LONG_WORD.sub(r"\1…", str(text).encode(errors="backslashreplace").decode())
    shown = _ADDRESS.sub(_masked_address, shown)
    shown = _BARE.sub(f"{MASK}@", shown)
    shown = _BEARER.sub(rf"\g<kind> {MASK}", shown)
    return "".join(_without_values(shown))


def _without_values(text: str) -> Iterator[str]:
    """The parts of a text, without what is assigned to secret names."""
    end = 0
    for name in _NAME.finditer(text):
        value = _VALUE.match(text, name.end())
        if name.start() >= end and value and _SECRET.search(name[0]):
            yield f"{text[end : value.start()]}{MASK}"
            end = value.end()
    yield text[end:]


def is_ambiguous(address: str) -> bool:
    """Whether a password seems to hold separators that were not escaped, so that no library finds the host."""
    rest = address.partition("://")[2]
    authority = re.split(r"[/?#]", rest, maxsplit=1)[0]
    path = rest[len(authority) :].partition("?")[0]
    port = authority.rpartition("@")[2].rpartition("]")[2].rpartition(":")
    return authority.count("@") > 1 or ("@" in path and ":" in authority) or bool(port[1] and not port[2].isdecimal())


def _masked_address(found: re.Match[str]) -> str:
    scheme, rest = found["scheme"], found["rest"]
    if scheme.endswith(":/") and ":" not in rest.rpartition("@")[0]:
        return found[0]  # e.g. C:/data, folder:/data/me@work
    rest, _, fragment = rest.partition("#") if _has_host(rest.partition("#")[0]) else (rest, "", "")
    rest, asked, query = rest.partition("?") if _has_host(rest.partition("?")[0]) else (rest, "", "")
    if scheme.startswith(("sqlite", "file")) and rest.startswith("/"):
        separator = ""  # a path
    else:
        separator = "@" if "@" in rest else "%40" if "%40" in rest.partition("/")[0] else ""
    if separator:
        rest = f"{MASK}@{rest.rpartition(separator)[2]}"
    query = "&".join(map(_masked_pair, query.split("&"))) if asked else ""
    if fragment:
        fragment = f"#{MASK if '=' in fragment or '@' in fragment else fragment}"
    return f"{scheme}{rest}{asked}{query}{fragment}"


def _has_host(start: str) -> bool:
    """Whether what stands before a separator can be the whole of host, port and path, so that the separator is one."""
    authority = start.partition("/")[0]
    port = authority.rpartition("@")[2].rpartition("]")[2].rpartition(":")
    return not port[1] or not port[2] or port[2].isdecimal()


def _masked_pair(pair: str) -> str:
    name, equals, _ = pair.partition("=")
    if equals and urllib.parse.unquote_plus(name).lower() in _PLAIN:
        return pair
    return f"{name}={MASK}" if equals else MASK
