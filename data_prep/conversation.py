"""Prompts and answers: records to text of which only the answers are learned.

A pair is a conversation of two messages. Each message becomes text by its role's turn; the content of the assistant's
messages counts towards the loss, and an end of text stands behind each of them, so that a model learns to stop there.
With the default turns::

    user:
    How many legs have three cats?

    assistant:
    Twelve.<end of text>

To ask a trained model, write the same up to the answer. Content is text, never markup: what looks like a turn or an
end of text in it is encoded letter by letter.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal, NamedTuple

from pydantic import Field, field_validator, model_validator

from lightbulb.config import Config

ANSWERING = "assistant"
"""The role whose messages count."""

PLACE = "{content}"


class ConversationConfig(Config):
    """Which fields hold prompts and answers, and the text that is made of them."""

    prompt: str = Field("prompt", min_length=1)
    """Field with the prompt; `a.b` is field b of field a."""

    answer: str = Field("answer", min_length=1)
    """Field with the answer."""

    messages: str | None = None
    """Field with a list of `{role, content}`, for prompt and answer. What follows the last answer is left out."""

    turns: dict[str, str] = {
        "system": "{content}\n\n",
        "user": "user:\n{content}\n\n",
        ANSWERING: "assistant:\n{content}",
    }
    """Text of a message by its role; of the assistant's only the content counts."""

    too_long: Literal["cut", "drop"] = "cut"
    """A conversation with more tokens than a row: cut its end off, if that leaves some of an answer, or drop it."""

    @field_validator("turns")
    @classmethod
    def _turns_have_a_place(cls, turns: dict[str, str]) -> dict[str, str]:
        for role, turn in turns.items():
            if turn.count(PLACE) != 1:
                raise ValueError(
                    f'{role}: {turn!r} must hold {PLACE} once; write for example "{role}:\\n{PLACE}\\n\\n"'
                )
        return turns

    @model_validator(mode="after")
    def _fields_and_roles_fit(self) -> "ConversationConfig":
        if self.messages is None and self.prompt == self.answer:
            raise ValueError(f"answer: {self.answer!r} is the prompt's field too; name two fields")
        needed = {ANSWERING} if self.messages is not None else {ANSWERING, "user"}
        if lacking := sorted(needed - set(self.turns)):
            raise ValueError(f'turns: has none for {lacking[0]!r}; add for example {lacking[0]}: "{PLACE}"')
        return self

    @property
    def fields(self) -> list[str]:
        """What is read of a record."""
        return [self.prompt, self.answer] if self.messages is None else [self.messages]


class Rendered(NamedTuple):
    """A conversation as text.

    Attributes:
        text: of all turns, without ends of text.
        answers: where in the text answers begin and end, by turns; empty for a document that counts as a whole.
    """

    text: str
    answers: tuple[int, ...] = ()


def render(config: ConversationConfig, values: Sequence[Any]) -> Rendered | str:
    """A record's ``fields`` as text, or the reason why it has none."""
    if config.messages is None:
        for field, value in zip(config.fields, values, strict=True):
            if not isinstance(value, str):
                return f"no_field_{field}"
        messages: list[Any] = [
            {"role": role, "content": value} for role, value in zip(("user", ANSWERING), values, strict=True)
        ]
    elif isinstance(values[0], list):
        messages = values[0]
    else:
        return f"no_field_{config.messages}"
    pieces: list[tuple[str, bool]] = []
    end = 0
    for message in messages:
        if not isinstance(message, dict) or not isinstance(content := message.get("content"), str):
            return "not_a_message"
        if (turn := config.turns.get(message.get("role", ""))) is None:
            return "unknown_role"
        before, _, after = turn.partition(PLACE)
        is_answer = message["role"] == ANSWERING and bool(content.strip())
        pieces += [(before, False), (content, is_answer), (after, False)]
        end = len(pieces) - 1 if is_answer else end
    return join(pieces[:end]) if end else "no_answer"


def join(pieces: Sequence[tuple[str, bool]]) -> Rendered:
    """Texts, each with whether it is an answer, as one."""
    answers: list[int] = []
    size = 0
    for text, is_answer in pieces:
        if is_answer:
            answers += [size, size + len(text)]
        size += len(text)
    return Rendered("".join(text for text, _ in pieces), tuple(answers))


def split(text: str, answers: Sequence[int]) -> Iterator[tuple[str, bool]]:
    """The inverse of :func:`join`, what lies between answers in one piece; all of a document without any counts."""
    if not answers:
        yield text, True
        return
    end = 0
    for begin, stop in zip(answers[::2], answers[1::2], strict=True):
        if begin > end:
            yield text[end:begin], False
        yield text[begin:stop], True
        end = stop


def changed(text: str, answers: Sequence[int], change: Callable[[str], str]) -> Rendered:
    """What a change to text makes of it piece by piece."""
    if not answers:
        return Rendered(change(text))
    return join([(change(piece), is_answer) for piece, is_answer in split(text, answers)])
