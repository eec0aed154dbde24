"""The page: modules, style and asset joined into one HTML file; what a run says is data in it, never markup."""

from __future__ import annotations

import base64
import hashlib
import html
import json
import re
from importlib import resources
from typing import Any

# In the order in which they run: each imports from those before it only.
MODULES = (
    "asset", "sort", "gl", "camera", "player", "stage", "pointer", "controls", "compare", "facts", "address", "live",
    "webm", "record", "main",
)  # fmt: skip
POLICY = (
    "default-src 'none'; script-src {script} blob:; worker-src blob:; style-src {style}; img-src data: blob:;"
    " media-src blob:; connect-src {connect}; base-uri 'none'; form-action 'none'"
)
NO_PICTURE = "data:image/gif;base64,R0lGODlhAQABAAAAACH5BAEKAAEALAAAAAABAAEAAAICTAEAOw=="  # one clear pixel
_IMPORT = re.compile(r"^import (\{[^}]*\}) from '\./(\w+)\.js';\n", re.MULTILINE)
_EXPORT = re.compile(r"^export ((?:async )?(?:function|class|const|let) )(\w+)", re.MULTILINE)
_LINE_COMMENT = re.compile(r"^\s*//.*\n", re.MULTILINE)
_BLOCK_COMMENT = re.compile(r"[ \t]*/\*\*(?:[^*]|\*(?!/))*\*/[ \t]*\n?")
_TRAILING_COMMENT = re.compile(r" // .*$", re.MULTILINE)
_TEXT = re.compile(r"""('(?:\\.|[^'\\\n])*'|`(?:\\.|[^`\\])*`)""")
_SPACED = re.compile(r" *([=,:;(){}\[\]<>&|?*]) *")  # not + and -: `a - -b` needs its spaces
_ENDED = re.compile(r"([;{,(])\n")  # where the line's end means nothing to the language


def page(
    title: str,
    about: dict[str, Any],  # what main.js reads, see its typedef About
    asset: bytes | None,  # what pack() gives; None: the page fetches it from about["asset"]
    poster: str = NO_PICTURE,  # address of a picture, normally data:
) -> str:
    """The whole page as text.  `title` and everything in `about` may hold any text."""
    style, script = _text("style.css"), joined_script()
    policy = POLICY.format(
        script=_digest(script), style=_digest(style), connect="'none'" if asset is not None else "'self'"
    )
    filled = {
        "policy": html.escape(policy, quote=False),  # its quotes are single, the attribute's double
        "title": html.escape(title),
        "style": style,
        "poster": html.escape(poster),
        "about": _json_in_html(about),
        "asset": base64.b64encode(asset or b"").decode(),
        "script": script,
    }
    return re.sub(r"@@(\w+)@@", lambda match: filled[match[1]], _text("page.html"))


def joined_script() -> str:
    """All modules as one classic script: each in a function of its own that returns what it exports."""
    parts = ["'use strict';"]
    for name in MODULES:
        source = _text(f"{name}.js")
        exported = ", ".join(match[2] for match in _EXPORT.finditer(source))
        source = _IMPORT.sub(lambda match: f"const {match[1]} = {_variable(match[2])};\n", source)
        source = _squeezed(_without_comments(_EXPORT.sub(r"\1\2", source)))
        parts.append(f"const {_variable(name)} = (() => {{\n{source}return {{ {exported} }};\n}})();")
    return "\n".join(parts)


def _variable(module: str) -> str:
    return f"${module}"


def _without_comments(source: str) -> str:
    """Readers find them in the modules; the page travels."""
    source = _TRAILING_COMMENT.sub("", _LINE_COMMENT.sub("", _BLOCK_COMMENT.sub("", source)))
    lines = (line.strip() for line in source.splitlines())
    return "".join(f"{line}\n" for line in lines if line)


def _squeezed(source: str) -> str:
    """Without spaces and ends of lines that mean nothing; texts and shaders stay as they are."""
    parts = _TEXT.split(source)
    return "".join(
        part if index % 2 else _ENDED.sub(r"\1", _SPACED.sub(r"\1", part)) for index, part in enumerate(parts)
    )


def _digest(source: str) -> str:
    """How a content security policy names the one inline script or style that it allows."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(source.encode()).digest()).decode()}'"


def _json_in_html(value: Any) -> str:
    """JSON that ends no element and opens no comment, whatever texts it holds."""
    text = json.dumps(value, allow_nan=False, separators=(",", ":"))  # ASCII only: U+2028 and the like are escaped
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _text(name: str) -> str:
    return (resources.files("d2.recon.viewer") / "page" / name).read_text(encoding="utf-8")
