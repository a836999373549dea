"""The objective as configuration: every part by name, and the presets that choose them together.

A preset is a few parts under the name that the field knows them by. Any part may be set beside it, and
wins; what a run prints and stores is the resolved parts. The formulas are in `stateset_ray.grpo`.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, Literal, Self, get_args

from pydantic import BaseModel, ConfigDict, Field, model_validator

__all__ = [
    "PRESETS",
    "AdvantageKind",
    "CreditKind",
    "ObjectiveConfig",
    "PresetName",
    "beside_preset",
    "beside_staleness",
    "check_sampling",
]

PresetName = Literal[
    "default", "grpo", "dr_grpo", "dapo", "gspo", "cispo", "rloo", "reinforce_pp", "dppo"
]  # fmt: skip
AdvantageKind = Literal[
    "mean", "mean_std", "rloo", "batch_std", "reinforce_pp", "reinforce_pp_baseline", "max_rl"
]  # fmt: skip
CreditKind = Literal["outcome", "return_to_go", "turn_plus_outcome"]

PRESETS: Mapping[PresetName, Mapping[str, Any]] = MappingProxyType({
    # What this project recommends for conversations: no division by a spread, clip-higher, token mean.
    "default": {},
    # Shao et al. 2024, arXiv:2402.03300, without its KL term, as most use it today.
    "grpo": {"advantage": "mean_std", "clip_high": 0.2, "aggregation": "sequence_mean"},
    # Liu et al. 2025, arXiv:2503.20783.
    "dr_grpo": {"clip_high": 0.2, "aggregation": "constant"},
    # Yu et al. 2025, arXiv:2503.14476: clip-higher, dynamic sampling, overlong shaping, token mean.
    "dapo": {"advantage": "mean_std", "refills": 3, "overlong_share": 0.2},
    # Zheng et al. 2025, arXiv:2507.18071.
    "gspo": {
        "advantage": "mean_std", "ratio": "sequence", "trust": "proximal",
        "clip_low": 3e-4, "clip_high": 4e-4, "aggregation": "sequence_mean",
    },
    # MiniMax 2025, arXiv:2506.13585; the weight is cut at 1 + clip_high = 5.
    "cispo": {"advantage": "mean_std", "loss": "cispo", "clip_high": 4.0},
    # Ahmadian et al. 2024, arXiv:2402.14740; sums over a conversation, as its sequence likelihood does.
    "rloo": {"advantage": "rloo", "clip_high": 0.2, "aggregation": "constant"},
    # Hu et al. 2025, arXiv:2501.03262; set kl_coef to have its KL per token in the reward.
    "reinforce_pp": {"advantage": "reinforce_pp", "clip_high": 0.2, "kl_in": "reward", "kl_estimator": "k1"},
    # The trust region on probabilities of prime-rl (its "binary TV").
    "dppo": {"loss": "dppo", "clip_high": 0.2},
})  # fmt: skip
"""Preset -> the parts in which it differs from the defaults of `ObjectiveConfig`."""

_NEUTRAL_SAMPLING = {
    "top_p": 1.0, "top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0, "presence_penalty": 0.0,
    "frequency_penalty": 0.0,
}  # fmt: skip


class ObjectiveConfig(BaseModel):
    """The objective. Formulas and sources: `stateset_ray.grpo`.

    Example:
        >>> ObjectiveConfig(preset="gspo", clip_low=1e-3).clip_low, ObjectiveConfig(preset="gspo").ratio
        (0.001, 'sequence')
    """

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())

    preset: PresetName = "default"
    """Chooses the parts below together; what is set beside it wins."""
    group_size: int = Field(default=8, ge=2)

    advantage: AdvantageKind = "mean"
    """What a return is compared with, and what it is divided by."""
    credit: CreditKind = "outcome"
    """Which rewards a turn answers for: those of the whole conversation, those from it on, or its own.

    `return_to_go` is compared with whole conversations, so it wants rewards that lie around 0 turn by turn,
    or are paid late: a late turn has less left to earn, and is praised or blamed for that."""
    gamma: float = Field(default=1.0, gt=0, le=1)
    """Discount per turn of `credit = "return_to_go"`."""
    outcome_weight: float = Field(default=1.0, ge=0)
    """Weight of the conversation's advantage beside the turn's own in `credit = "turn_plus_outcome"`."""
    reward_weights: Mapping[str, float] = Field(default_factory=dict)
    """Named rewards (`Step.rewards`) to be normalized apart and then summed; empty: the one reward.

    `truncated = "clamp"` then holds for each of them, and the overlong penalty is divided among them."""
    truncated: Literal["grade", "clamp", "mask"] = "grade"
    """A conversation that a limit ended keeps its reward, or at most 0 of it, or gives no gradient."""
    overlong_share: float = Field(default=0.0, ge=0, lt=1)
    """The last share of a conversation's tokens over which a penalty grows; 0: none (DAPO)."""
    overlong_penalty: float = Field(default=1.0, ge=0)
    """What a conversation at its very limit loses, in units of reward."""
    refills: int = Field(default=0, ge=0)
    """Rounds in which groups of equal rewards are replaced by new tasks (DAPO's dynamic sampling)."""
    shuffle_rewards: bool = False
    """Control experiment: permute the rewards inside each group. Nothing may be learned then."""

    loss: Literal["ppo", "cispo", "sapo", "dppo", "importance"] = "ppo"
    ratio: Literal["token", "sequence"] = "token"
    """A ratio per token, or one per sequence: the geometric mean over its sampled tokens (GSPO)."""
    trust: Literal["sampler", "proximal"] = "sampler"
    """What the ratio is taken against: what the sampler said, or the policy as the step began."""
    clip_low: float = Field(default=0.2, gt=0, lt=1)
    """PPO: the ratio's lower bound is 1 - clip_low. DPPO: how far a probability may fall."""
    clip_high: float = Field(default=0.28, gt=0)
    """PPO: the ratio's upper bound is 1 + clip_high. CISPO: the weight's. DPPO: how far one may rise."""
    dual_clip: float = Field(default=0.0, ge=0)
    """PPO: the ratio that a negative advantage is charged for at most; 0: no bound."""
    sapo_tau_positive: float = Field(default=1.0, gt=0)
    sapo_tau_negative: float = Field(default=1.05, gt=0)
    log_ratio_penalty: float = Field(default=1e-3, ge=0)
    """DPPO: weight of the squared log-ratio."""
    aggregation: Literal["token_mean", "sequence_mean", "constant"] = "token_mean"
    """Every token alike, every conversation alike, or a sum over a constant (Dr. GRPO)."""

    correction: Literal["none", "tis", "mis"] = "none"
    """With `trust = "proximal"`: weight by exp(proximal - sampler), cut at a bound (TIS) or dropped (MIS)."""
    correction_level: Literal["token", "sequence"] = "token"
    correction_low: float = Field(default=0.5, ge=0)
    """MIS: weights below are dropped."""
    correction_high: float = Field(default=2.0, gt=0)
    """TIS: weights above are cut to it. MIS: they are dropped."""

    kl_coef: float = Field(default=0.0, ge=0)
    """Weight of the KL to a frozen reference; 0 needs no reference."""
    kl_estimator: Literal["k1", "k2", "k3"] = "k3"
    kl_in: Literal["loss", "reward"] = "loss"
    kl_target: float = Field(default=0.0, ge=0)
    """Nats per token that `kl_coef` is steered to, step by step; 0: it stays."""
    reference: str = ""
    """The reference model, of the same vocabulary; empty: the model that the run began with."""
    reference_every: int = Field(default=0, ge=0)
    """Steps after which the reference becomes the policy; 0: never."""
    entropy_coef: float = Field(default=0.0, ge=0)
    """Weight of the entropy bonus."""

    @model_validator(mode="before")
    @classmethod
    def _resolve_preset(cls, given: Any) -> Any:
        """The preset's parts under what was set beside it; an unknown preset is left to be reported."""
        if not isinstance(given, Mapping) or given.get("preset") not in get_args(PresetName):
            return given
        return {**PRESETS[given["preset"]], **given}

    @model_validator(mode="after")
    def _parts_agree(self) -> Self:
        for wrong, problem in self._contradictions():
            if wrong:
                raise ValueError(problem)
        return self

    def summary(self) -> str:
        """The resolved parts in one line.

        Example:
            >>> ObjectiveConfig(preset="dr_grpo").summary()
            'dr_grpo: advantage mean, loss ppo (token ratio to the sampler, clip 0.2/0.2), constant'
        """
        loss = f"{self.ratio} ratio to the {self.trust}"
        if self.loss in ("ppo", "cispo", "dppo"):
            loss += f", clip {self.clip_low:g}/{self.clip_high:g}"
        if self.dual_clip:
            loss += f", dual clip {self.dual_clip:g}"
        parts = [f"advantage {self.advantage}", f"loss {self.loss} ({loss})", self.aggregation]
        if self.credit != "outcome":
            parts.insert(1, f"credit {self.credit}")
        if self.correction != "none":
            parts.append(f"{self.correction} per {self.correction_level}")
        if self.kl_coef:
            parts.append(f"{self.kl_coef:g} {self.kl_estimator} in the {self.kl_in}")
        if self.entropy_coef:
            parts.append(f"{self.entropy_coef:g} entropy")
        if self.refills:
            parts.append(f"up to {self.refills} refills")
        if self.overlong_share:
            parts.append(f"overlong from the last {self.overlong_share:.0%}")
        return f"{self.preset}: {', '.join(parts)}"

    def _contradictions(self) -> list[tuple[bool, str]]:
        kl = self.kl_coef > 0
        corrected = self.correction != "none"
        return [
            (
                self.loss != "ppo" and (self.dual_clip > 0 or self.ratio == "sequence"),
                f"grpo.dual_clip and grpo.ratio = 'sequence' belong to grpo.loss = 'ppo', not {self.loss!r}",
            ),
            (
                0 < self.dual_clip <= 1 + self.clip_high,
                f"grpo.dual_clip = {self.dual_clip} must exceed the upper clip 1 + grpo.clip_high = "
                f"{1 + self.clip_high:g}, or it would cut what the clip still allows",
            ),
            (
                self.loss == "dppo" and self.clip_high >= 1,
                f"grpo.loss = 'dppo' bounds differences of probabilities: grpo.clip_high = {self.clip_high} "
                "must be below 1",
            ),
            (
                self.loss == "dppo" and self.trust == "proximal",
                "grpo.loss = 'dppo' compares with the sampler's probabilities: set grpo.trust = 'sampler'",
            ),
            (
                corrected and self.trust == "sampler",
                f"grpo.correction = {self.correction!r} beside grpo.trust = 'sampler' would correct twice: "
                "the ratio to the sampler is the correction; set grpo.trust = 'proximal'",
            ),
            (
                self.correction == "mis" and self.correction_low >= self.correction_high,
                f"grpo.correction_low = {self.correction_low} must be below grpo.correction_high = "
                f"{self.correction_high}",
            ),
            (
                kl and self.kl_in == "loss" and self.kl_estimator == "k1",
                "grpo.kl_estimator = 'k1' in the loss has an expected gradient of 0 and teaches nothing: "
                "take k2 or k3, or set grpo.kl_in = 'reward'",
            ),
            (
                not kl and (self.kl_target > 0 or bool(self.reference) or self.reference_every > 0),
                "grpo.kl_target, reference and reference_every do nothing while grpo.kl_coef = 0",
            ),
            (
                bool(self.reference) and self.reference_every > 0,
                f"grpo.reference_every cannot move the reference to the policy while grpo.reference = "
                f"{self.reference!r} names another model: set one of them to its default",
            ),
            (
                self.gamma != 1 and self.credit != "return_to_go",
                f"grpo.gamma = {self.gamma} does nothing with grpo.credit = {self.credit!r}: "
                "set grpo.credit = 'return_to_go'",
            ),
            (
                bool(self.reward_weights) and sum(self.reward_weights.values()) <= 0 < self.overlong_share,
                "grpo.overlong_share charges each of grpo.reward_weights its share of the penalty, but the "
                f"weights sum to {sum(self.reward_weights.values()):g}: make the sum positive",
            ),
            (
                bool(self.reward_weights) and not any(self.reward_weights.values()),
                "every weight in grpo.reward_weights is 0, so nothing would be rewarded",
            ),
        ]


def beside_preset(section: Any) -> Any:
    """What of a resolved `[grpo]` section was set beside its preset, so that another preset may take over.

    A section that does not name every part was written by a person: each of its parts was set on purpose.

    Example:
        >>> resolved = ObjectiveConfig(preset="gspo", gamma=1.0, group_size=4).model_dump()
        >>> beside_preset(resolved)
        {'preset': 'gspo', 'group_size': 4}
    """
    fields = ObjectiveConfig.model_fields
    if not isinstance(section, Mapping) or section.keys() != fields.keys():
        return section
    chosen = PRESETS.get(section["preset"], {})
    defaults = {name: info.get_default(call_default_factory=True) for name, info in fields.items()}
    return {name: value for name, value in section.items() if value != chosen.get(name, defaults[name])}


def beside_staleness(section: Any, *, stale: bool) -> Any:
    """A resolved `[grpo]` section without what follows from `train.max_staleness`, which is about to change.

    Args:
        stale: whether the section is of a run whose rollouts ran ahead (`config.corrected`).

    Example:
        >>> beside_staleness(ObjectiveConfig().model_dump(), stale=False).keys() & {"trust", "correction"}
        set()
    """
    fields = ObjectiveConfig.model_fields
    if not isinstance(section, Mapping) or section.keys() != fields.keys():
        return section
    chosen = {"trust": "sampler", "correction": "none", **PRESETS.get(section["preset"], {})}
    followed = {"trust": "proximal", "correction": "tis"} if stale else chosen
    if any(section[name] != followed[name] for name in ("trust", "correction")):
        return section  # set on purpose
    return {name: value for name, value in section.items() if name not in ("trust", "correction")}


def check_sampling(given: Any) -> Any:
    """Refuse sampling options that training cannot correct for, with the reason.

    Top-p, top-k and penalties change the distribution that tokens are drawn from, while the log-probabilities
    stay those of the whole one: importance ratios become biased.

    Returns:
        The mapping without such options, if all of them are neutral.

    Raises:
        ValueError: one of them is not.
    """
    if not isinstance(given, Mapping):
        return given
    for name, neutral in _NEUTRAL_SAMPLING.items():
        if name in given and given[name] != neutral:
            raise ValueError(
                f"rollout.{name} = {given[name]!r} changes the distribution that is sampled from and would "
                f"bias every importance ratio: leave it out (or {neutral!r}); use rollout.temperature"
            )
    return {key: value for key, value in given.items() if key not in _NEUTRAL_SAMPLING}
