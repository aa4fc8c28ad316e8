"""The parts of a run, loaded and held against each other before anything is trained or written."""

from dataclasses import dataclass

from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from kleash.batch import Prompts, Rollout
from kleash.config import RunConfig, Source
from kleash.errors import ModelError
from kleash.language_model import LanguageModel, Models, language_models
from kleash.models import (
    ValueModel,
    adapter_name,
    adapter_tensors,
    context_length,
    eos_token_ids,
    frozen,
    learning_names,
    load_causal_model,
    load_tokenizer,
    require_same_vocabulary,
    require_special_tokens,
    shared_vocabulary,
    value_model_from_policy,
    value_model_from_reward,
)
from kleash.prompts import load_prompts, require_prompts, require_room, tokenized_prompts
from kleash.reference import frozen_copy, require_movable, without_adapter
from kleash.rollout import RolloutConfig, rollout_of
from kleash.scorers import Scorer, WeightedScorer, load_scorer, reward_models, value_trunk_source


@dataclass(frozen=True, kw_only=True)
class Parts:
    """What a run works with; models are still on the CPU and unwrapped.

    first_reference is where a reference that moves begins; None for one that does not.
    """

    tokenizer: PreTrainedTokenizerBase
    policy: PreTrainedModel
    reference: PreTrainedModel
    first_reference: PreTrainedModel | None = None
    value: ValueModel
    scorer: Scorer
    eval_scorer: Scorer | None
    prompts: Prompts
    eos_token_ids: list[int]

    @property
    def vocab(self) -> int:
        """How many tokens both models know; what one of them has beyond is padding."""
        return shared_vocabulary(self.policy, self.reference)

    @property
    def every_model(self) -> list[nn.Module]:
        """Policy, references, value model and reward models."""
        scorers = filter(None, (self.scorer, self.eval_scorer))
        first = [] if self.first_reference is None else [self.first_reference]
        judges = [model for scorer in scorers for model in reward_models(scorer)]
        return [self.policy, self.reference, *first, self.value, *judges]

    def models(self) -> Models:
        """Policy, references and value model as an update sees them, not yet wrapped for several processes."""
        policy, reference = language_models(self.policy, self.reference, vocab=self.vocab)
        first = self.first_reference
        return Models(
            policy=policy,
            value=self.value,
            reference=reference,
            first_reference=None if first is None else LanguageModel(first, linear=reference.linear, vocab=self.vocab),
        )

    def rollout(self, model: PreTrainedModel, prompts: Prompts, uniforms: Tensor, config: RolloutConfig) -> Rollout:
        """One response of the policy, or of the reference, to each prompt: see rollout_of."""
        return rollout_of(
            model,
            prompts,
            self.tokenizer,
            uniforms=uniforms,
            config=config,
            eos_token_ids=self.eos_token_ids,
            device=model.device,
            vocab=self.vocab,
        )


@dataclass(frozen=True, kw_only=True)
class Given:
    """Parts that a caller hands over as objects instead of names; None = load what the config names."""

    policy: PreTrainedModel | None = None
    tokenizer: PreTrainedTokenizerBase | None = None
    reference: PreTrainedModel | None = None
    scorer: Scorer | None = None
    eval_scorer: Scorer | None = None
    rows: list[dict[str, object]] | None = None


def load_parts(config: RunConfig, given: Given) -> Parts:
    """Load everything that a configuration names, cheapest first, and check that it fits together.

    Raises:
      PromptError, ModelError, RewardError: see the functions that this one calls.
    """
    rows = load_prompts(config.prompts) if given.rows is None else given.rows
    require_prompts(rows, "the prompts")
    tokenizer = given.tokenizer or load_tokenizer(config.policy, pad_token=config.pad_token)
    require_special_tokens(tokenizer)
    prompts = tokenized_prompts(rows, tokenizer)
    policy = given.policy or load_causal_model(config.policy, "policy", adapter_learns=True)
    policy.eval()  # type: ignore[no-untyped-call]
    require_learning(policy)
    require_room(prompts, max_new_tokens=config.rollout.max_new_tokens, context=context_length(policy))
    reference = _reference(config, given, policy, tokenizer)
    follows = config.reference.moves and given.reference is None
    if follows:
        require_movable(reference, policy, averaged=config.reference.kind == "moving_average")
    scorer = given.scorer or scorer_from(config.reward, tokenizer)
    eval_scorer = given.eval_scorer or (scorer_from(config.eval_reward, tokenizer) if config.eval_reward else None)
    trunk = value_trunk_source(scorer)
    return Parts(
        tokenizer=tokenizer,
        policy=policy,
        reference=reference,
        first_reference=frozen_copy(reference, own=learning_names(policy)) if follows else None,
        value=value_model_from_policy(policy) if trunk is None else value_model_from_reward(trunk),
        scorer=scorer,
        eval_scorer=eval_scorer,
        prompts=prompts,
        eos_token_ids=eos_token_ids(policy, tokenizer),
    )


def _reference(
    config: RunConfig, given: Given, policy: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> PreTrainedModel:
    """The reference at the start of the run, frozen."""
    kind, path = config.reference.kind, config.reference.path
    if given.reference is None and kind == "adapter_off":
        return without_adapter(policy)
    if given.reference is None and path is None:
        return frozen_copy(policy)
    reference = given.reference or load_causal_model(path or "", "reference")
    _require_parameters_of_its_own(reference, policy)
    named = path if given.reference is None else None
    source = reference.config._name_or_path or named or "the model that was given"
    require_same_vocabulary(tokenizer, source, reference, policy.config.get_text_config().vocab_size)
    return frozen(reference)


def require_learning(policy: PreTrainedModel) -> None:
    """Raise ModelError unless something of the policy learns, and a checkpoint would hold all that does."""
    learning = {name: policy.get_parameter(name) for name in learning_names(policy)}
    if not learning:
        raise ModelError(
            "Expected a policy with parameters that learn, found that all of them are frozen; "
            "set requires_grad, or load an adapter with is_trainable=True."
        )
    if adapter_name(policy) is None:
        return
    kept = {tensor.data_ptr() for tensor in adapter_tensors(policy).values()}
    outside = [name for name, parameter in learning.items() if parameter.data_ptr() not in kept]
    if outside:
        raise ModelError(
            f"Expected a policy whose adapter alone learns, found that {outside[0]} does too; freeze it, or name its "
            "module in modules_to_save of the adapter."
        )


def _require_parameters_of_its_own(reference: PreTrainedModel, policy: PreTrainedModel) -> None:
    learning = {id(parameter) for parameter in policy.parameters() if parameter.requires_grad}
    shared = [name for name, parameter in reference.named_parameters() if id(parameter) in learning]
    if shared:
        raise ModelError(
            f"Expected a reference with parameters of its own, found that it shares {shared[0]} with the policy; "
            "leave reference out, which takes a frozen copy of the policy, or give a model loaded apart."
        )


def scorer_from(source: Source, tokenizer: PreTrainedTokenizerBase) -> Scorer:
    """The scorer that a configuration names: one source, or a weighted list."""
    if isinstance(source, str):
        return load_scorer(source, tokenizer)
    return WeightedScorer(
        scorers=tuple(load_scorer(part.source, tokenizer) for part in source),
        weights=tuple(part.weight for part in source),
    )
