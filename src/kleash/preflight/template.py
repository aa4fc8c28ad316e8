"""The chat template: written once around each prompt, and the same one that reference and reward model know."""

from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

from kleash.batch import PromptText
from kleash.config import RunConfig
from kleash.drift_map import special_token_ids
from kleash.models import tokenizer_beside
from kleash.parts import Parts
from kleash.preflight.check import Check, failed, passed, warned
from kleash.preflight.tokens import scoring_models
from kleash.scorers import ModelScorer, shortened

NAME = "chat template"
STAND_IN = "kleash stand-in"
SHORTEST_MARK = 3  # characters; less is no mark but punctuation


@dataclass(frozen=True, kw_only=True)
class Marks:
    """What a template writes around one message of a user, and the special tokens as text."""

    before: str
    after: str
    special: list[str]


def template_once(parts: Parts, config: RunConfig) -> Check:
    """Whether the marks of the template, and BOS, stand around a prompt once."""
    prompts, tokenizer, marks = parts.prompts, parts.tokenizer, _marks_of(parts.tokenizer)
    found = [
        _doubled_bos(tokens, tokenizer) or _mark_within(text, marks)
        for text, tokens in zip(prompts.texts, prompts.tokens, strict=True)
    ]
    rows = [row for row, mark in enumerate(found) if mark is not None]
    if rows:
        said = f"{found[rows[0]]} in prompt {rows[0] + 1}, {shortened(prompts.texts[rows[0]], 60)}"
        if 2 * len(rows) > len(found):
            return failed(
                NAME,
                f"{said}, and so in {len(rows)} of {len(found)}: the template is applied twice",
                "give bare messages, or bare text: kleash writes the template around messages, the tokenizer its BOS",
            )
        return warned(
            NAME,
            f"{said}, and so in {len(rows)} of {len(found)} prompts: the text holds marks that only the template "
            "should write",
            "take them out of the prompts",
        )
    chats = sum(not isinstance(text, str) for text in prompts.texts)
    if not chats:
        beside = ", no template written, though the tokenizer has one" if tokenizer.chat_template else ""
        return passed(NAME, f"{len(found)} prompts of plain text{beside}")
    odd = _other_template(parts, config)
    if odd is not None:
        return warned(NAME, odd, "give both the template that the model was trained with")
    return passed(NAME, f"written once around {chats} of {len(found)} prompts")


def _marks_of(tokenizer: PreTrainedTokenizerBase) -> Marks:
    special = set(special_token_ids(tokenizer)) - {tokenizer.unk_token_id}
    texts = [str(token) for token in tokenizer.convert_ids_to_tokens(sorted(special))]
    before, after = "", ""
    if tokenizer.chat_template is not None:
        messages = [{"role": "user", "content": STAND_IN}]
        rendered: Any = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        before, found, after = str(rendered).partition(STAND_IN)
        before, after = (before.strip(), after.strip()) if found else ("", "")
    return Marks(before=before, after=after, special=texts)


def _doubled_bos(tokens: list[int], tokenizer: PreTrainedTokenizerBase) -> str | None:
    bos = tokenizer.bos_token_id
    return f"two {tokenizer.bos_token!r} at the start" if bos is not None and tokens[:2] == [bos, bos] else None


def _mark_within(text: PromptText, marks: Marks) -> str | None:
    """A mark within a message that the template will be written around; in plain text one that stands there twice."""
    if isinstance(text, str):
        bare = "".join(text.split())
        for mark in ("".join(marks.before.split()), "".join(marks.after.split())):
            if len(mark) >= SHORTEST_MARK and mark + mark in bare:
                return f"{mark!r} twice in a row"
        return None
    for content in (str(message["content"]) for message in text):
        if marks.before and marks.after and marks.before in content and marks.after in content:
            return f"{marks.before!r} and {marks.after!r} in a message"
        for mark in marks.special:
            if len(mark) >= SHORTEST_MARK and mark in content:
                return f"{mark!r} in a message"
    return None


def _other_template(parts: Parts, config: RunConfig) -> str | None:
    """Which model was made for another template than the one that its prompts will have."""
    places = [
        (f"{role} model {scorer.name}", scorer.model.config._name_or_path)
        for role, scorer in scoring_models(parts)
        if isinstance(scorer, ModelScorer)
    ]
    if config.reference.path is not None:
        places.append(("reference", config.reference.path))
    for name, place in places:
        beside = tokenizer_beside(place)
        if beside is not None and beside.chat_template not in (None, parts.tokenizer.chat_template):
            return f"the {name} has another chat template than the policy, whose tokens it reads"
    return None
