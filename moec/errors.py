"""The one error users see: a code, what was found and expected, where, and what to do about it."""

from collections.abc import Iterable, Mapping
from difflib import get_close_matches
from types import MappingProxyType

CODES: Mapping[str, str] = MappingProxyType(
    {
        # 1xx: the IR and its text
        "MOEC101": "unknown element type",
        "MOEC102": "attribute value out of range",
        "MOEC103": "operand of the wrong rank",
        "MOEC104": "operand of the wrong element type",
        "MOEC105": "sizes that disagree",
        "MOEC106": "operands or attributes that do not go together",
        "MOEC107": "malformed size",
        "MOEC108": "size without a value",
        "MOEC109": "shapes that do not fit the region's inputs",
        "MOEC110": "undefined value",
        "MOEC111": "value defined twice",
        "MOEC112": "declared type differs from the inferred one",
        "MOEC113": "wrong number of results",
        "MOEC114": "letter that no input binds",
        "MOEC115": "one weight reference, two types",
        "MOEC116": "malformed name",
        "MOEC117": "region without outputs",
        "MOEC118": "attribute that text cannot hold",
        "MOEC120": "syntax error in IR text",
        "MOEC121": "unknown op",
        "MOEC122": "unknown operand or attribute",
        "MOEC123": "attribute of the wrong kind",
        "MOEC124": "missing operand or attribute",
        "MOEC125": "missing result type",
        "MOEC130": "region name used twice in a program",
        "MOEC131": "opaque graph that the program does not define",
        "MOEC132": "no such region in the program",
        # 2xx: the PyTorch front end and installed layers
        "MOEC209": "something that is no module",
        "MOEC210": "module that cannot be copied",
        "MOEC211": "model that does not run on its example inputs",
        "MOEC212": "model that is not compiled",
        "MOEC213": "example inputs of the wrong kind",
        "MOEC220": "layer left alone under strict",
        "MOEC221": "layer that failed verification under strict",
        "MOEC230": "weights or code that are not what they were",
        "MOEC231": "compiled layer that runs its original code",
        "MOEC232": "compiled method without its module",
        "MOEC233": "layer changed between forward and backward",
        "MOEC234": "layer that cannot run inside of a graph",
        "MOEC235": "backward through a layer inside of a graph",
        "MOEC236": "experts that transformers cannot run by moec",
        # 3xx: passes and their runner
        "MOEC301": "unknown pass",
        "MOEC302": "unknown or missing option of a pass",
        "MOEC303": "option of a pass with a value of the wrong type",
        "MOEC304": "option of a pass out of range",
        "MOEC305": "syntax error in a list of passes",
        "MOEC306": "pass that broke the region",
        "MOEC307": "pass that failed",
        "MOEC308": "passes in the wrong order",
        "MOEC309": "something that is not a pass",
        "MOEC310": "option of a pass that does not fit the region",
        # 4xx: back ends
        "MOEC401": "unknown back end",
        "MOEC403": "op that the back end cannot run",
        "MOEC404": "input that is not what the region takes",
        "MOEC405": "weight that is not what the region takes",
        "MOEC406": "opaque graph that was not handed over",
        "MOEC407": "opaque graph with other results than declared",
        "MOEC408": "back end that cannot run on this machine",
        # 5xx: the API and its options
        "MOEC501": "unknown option",
        "MOEC502": "option value that cannot be",
        "MOEC503": "something that does not exist yet",
        "MOEC504": "nothing to measure",
        # 6xx: the command line and files
        "MOEC601": "file that cannot be read",
        "MOEC602": "model of a kind moec does not read",
        "MOEC603": "factory that gave no model",
        "MOEC604": "transformers model that cannot be loaded",
        "MOEC605": "inputs that cannot be guessed",
        "MOEC606": "model without MoE or FFN layers",
        "MOEC607": "file that cannot be written",
        "MOEC608": "no layer of that name",
        "MOEC609": "missing package",
        "MOEC610": "tuning results that cannot be read",
        # 7xx: exporting to ONNX
        "MOEC701": "arguments without names",
        "MOEC702": "model that torch cannot export",
        "MOEC703": "example inputs that are missing",
        "MOEC704": "export that failed verification",
        "MOEC705": "export without anything to rewrite",
        "MOEC706": "output that is the input",
        "MOEC707": "ONNX file that cannot be read",
        "MOEC708": "inputs that cannot be invented",
    }
)


class MoecError(Exception):
    """An error a user can act on. `code` is a key of CODES; bugs of our own are assertions instead."""

    def __init__(self, code: str, message: str, *, where: str | None = None, hint: str | None = None) -> None:
        assert code in CODES, f"{code} is not in moec.errors.CODES"
        super().__init__(code, message)
        self.code = code
        self.message = message
        self.where = where
        self.hint = hint

    def __str__(self) -> str:
        text = f"[{self.code}] {self.message}"
        if self.where:
            text += f"\n  at {self.where}"
        if self.hint:
            text += f"\n  hint: {self.hint}"
        return text

    def __reduce__(self) -> tuple[object, ...]:
        # The default would rebuild from args and lose the keyword-only parts.
        return _rebuild, (self.code, self.message, self.where, self.hint)

    def located(self, where: str) -> "MoecError":
        """The same error with a place, unless it has one already: the innermost place is the most exact."""
        return self if self.where else MoecError(self.code, self.message, where=where, hint=self.hint)


def _rebuild(code: str, message: str, where: str | None, hint: str | None) -> MoecError:
    return MoecError(code, message, where=where, hint=hint)


def count(number: int, word: str) -> str:
    """`1 value`, `2 values`: for messages."""
    return f"{number} {word}{'' if number == 1 else 's'}"


def did_you_mean(name: str, known: Iterable[str]) -> str | None:
    """A hint that names the closest of `known`, or None when nothing is close."""
    close = get_close_matches(name, sorted(known), n=1, cutoff=0.6)
    return f'did you mean "{close[0]}"?' if close else None
