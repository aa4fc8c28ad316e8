"""Tokenizers, vocabularies, chat templates, pad and EOS: whether all parts mean the same by a token id."""

from collections.abc import Iterator

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from kleash.config import RunConfig
from kleash.models import response_logits, tokenizer_beside
from kleash.parts import Parts
from kleash.preflight.check import Check, failed, passed, warned
from kleash.scorers import ModelScorer, TextModelScorer, model_scorers

STRAY_MASS = 0.01  # of the policy's probability, on tokens that the tokenizer does not know
PLAIN: dict[str, tuple[object, ...]] = {  # values of a generation config that leave the softmax as it is
    "top_k": (None, 0),
    "top_p": (None, 1.0),
    "min_p": (None, 0.0),
    "typical_p": (None, 1.0),
    "top_h": (None,),
    "epsilon_cutoff": (None, 0.0),
    "eta_cutoff": (None, 0.0),
    "repetition_penalty": (None, 1.0),
    "no_repeat_ngram_size": (None, 0),
    "min_length": (None, 0),
    "min_new_tokens": (None, 0),
    "bad_words_ids": (None,),
    "suppress_tokens": (None,),
    "begin_suppress_tokens": (None,),
    "sequence_bias": (None,),
}


def scoring_models(parts: Parts) -> Iterator[tuple[str, ModelScorer | TextModelScorer]]:
    """(role, scorer) of every reward model among the reward and the held-out judge."""
    for role, scorer in (("reward", parts.scorer), ("judge", parts.eval_scorer)):
        if scorer is not None:
            yield from ((role, part) for part in model_scorers(scorer))


def tokenizers_match(parts: Parts) -> Check:
    """Whether policy and reward models read a token id as the tokenizer writes it; loading has held the reference."""
    name, known = "tokenizers match", len(parts.tokenizer.get_vocab())
    source = parts.policy.config._name_or_path
    beside = None if source == parts.tokenizer.name_or_path else tokenizer_beside(source)
    odd = None if beside is None else _shared_difference(parts.tokenizer, beside)
    if odd is not None:
        return failed(name, f"the tokenizer beside the policy is another one: {odd}", "take the policy's own tokenizer")
    models = list(scoring_models(parts))
    for role, scorer in models:
        place = scorer.model.config._name_or_path  # empty for a model that was built in memory
        if place and isinstance(scorer, ModelScorer) and tokenizer_beside(place) is None:
            return warned(
                name,
                f"no tokenizer lies beside the {role} model {scorer.name}, so it is taken to share the policy's tokens",
                "save its tokenizer beside it",
            )
    sharing, own = ["policy", "reference"], list[str]()
    for role, scorer in models:
        (own if isinstance(scorer, TextModelScorer) else sharing).append(f"{role} model")
    readers = list(dict.fromkeys(sharing))
    said = f"{known} tokens, the same ids in {', '.join(readers[:-1])} and {readers[-1]}"
    if own:
        said += f"; the {' and the '.join(dict.fromkeys(own))} has a tokenizer of its own, and is given the text"
    return passed(name, said)


def _shared_difference(ours: PreTrainedTokenizerBase, theirs: PreTrainedTokenizerBase) -> str | None:
    """The first id that both know and read differently; an adapter's tokenizer may have more than its base's."""
    our, their = ({index: token for token, index in one.get_vocab().items()} for one in (ours, theirs))
    for index in sorted(our.keys() & their.keys()):
        if our[index] != their[index]:
            return f"token {index} is {their[index]!r} there and {our[index]!r} in the run"
    return None


@torch.no_grad()
def vocabulary_fits(parts: Parts) -> Check:
    """Whether every token has an embedding and a logit, and the policy writes tokens that exist."""
    name, known = "vocabulary fits", max(parts.tokenizer.get_vocab().values()) + 1
    rows = dict(_widths(parts))
    for role, (embedded, logits, configured) in rows.items():
        if min(embedded, logits) < known:
            return failed(
                name,
                f"the tokenizer has {known} tokens, the {role} {embedded} embeddings and {logits} logits",
                f"call resize_token_embeddings({known}) on it, train the new rows and save it, or take the tokenizer "
                "that it was trained with",
            )
        if logits != configured:
            return failed(
                name,
                f"the {role} has {logits} logits and its config says {configured}",
                "resize both with resize_token_embeddings and save the model again",
            )
    for role, scorer in scoring_models(parts):
        own = known if isinstance(scorer, ModelScorer) else max(scorer.tokenizer.get_vocab().values()) + 1
        embedded = _embeddings(scorer.model)
        if embedded < own:
            return failed(
                name,
                f"the {role} model {scorer.name} has {embedded} embeddings for {own} tokens",
                "take the tokenizer that it was trained with",
            )
    return _within_the_tokenizer(name, parts, known)


def _within_the_tokenizer(name: str, parts: Parts, known: int) -> Check:
    if parts.vocab == known:
        return passed(name, f"{known} tokens, {known} logits")
    tokens = torch.tensor([[*parts.prompts.tokens[0], parts.prompts.tokens[0][-1]]], device=parts.policy.device)
    logits = response_logits(parts.policy, tokens, torch.ones_like(tokens, dtype=torch.bool), 1)
    stray = float(logits.float()[..., : parts.vocab].softmax(-1)[..., known:].sum())
    said = f"{parts.vocab} logits for {known} tokens, and the policy puts {stray:.2g} of its probability beyond them"
    if stray > STRAY_MASS:
        return failed(
            name,
            said,
            "its embeddings were resized and the new rows never trained: save the tokenizer that has these tokens "
            f"beside it, or call resize_token_embeddings({known})",
        )
    return passed(name, said)


def _widths(parts: Parts) -> Iterator[tuple[str, tuple[int, int, int]]]:
    """(role, (embeddings, logits, tokens by its config)) of policy and reference."""
    for role, model in (("policy", parts.policy), ("reference", parts.reference)):
        head = model.get_output_embeddings()  # type: ignore[no-untyped-call]
        configured = int(model.config.get_text_config().vocab_size)
        logits = configured if head is None else int(head.weight.shape[0])
        yield role, (_embeddings(model), logits, configured)


def _embeddings(model: PreTrainedModel) -> int:
    return int(model.get_input_embeddings().get_parameter("weight").shape[0])


def pad_and_eos(parts: Parts) -> Check:
    """Whether pad and EOS are there, within the vocabulary, and two tokens."""
    name, pad, eos = "pad and EOS", parts.tokenizer.pad_token_id, parts.eos_token_ids
    beyond = [token for token in eos if token >= parts.vocab]
    if beyond:
        return failed(
            name,
            f"EOS {beyond[0]} has no logit among {parts.vocab}, so no response can close with it",
            "correct eos_token_id in the generation config, or the tokenizer's eos_token",
        )
    names = ", ".join(f"{parts.tokenizer.convert_ids_to_tokens(token)!r} ({token})" for token in eos)
    said = f"pad {parts.tokenizer.pad_token!r} ({pad}), EOS {names}"
    if pad in eos:
        return warned(
            name,
            f"{said}: one token for both; kleash masks the padding and does not look for it",
            "set pad_token to another token if a reward or a later trainer searches the text for padding",
        )
    return passed(name, said)


def generation_config(parts: Parts, config: RunConfig) -> Check:
    """Whether whoever serves the policy by its generation config would sample what kleash trains."""
    name, temperature = "generation config", config.rollout.temperature
    named = {} if parts.policy.generation_config is None else parts.policy.generation_config.to_dict()
    served = named.get("temperature")
    odd = {key: named[key] for key, plain in PLAIN.items() if key in named and named[key] not in plain}
    if served is not None and served != temperature:
        odd = {"temperature": served, **odd}
    if odd:
        said = ", ".join(f"{key} {value}" for key, value in odd.items())
        return warned(
            name,
            f"the policy's generation config says {said}; kleash samples and scores the whole softmax at temperature "
            f"{temperature:g}",
            "serve the trained policy without these, or set rollout.temperature to the one it is served at",
        )
    return passed(name, f"the whole softmax at temperature {temperature:g}, nothing cut off")
