"""One rank of the engine tests: plays every scenario in a process of its own and writes down what came.

A process group and DeepSpeed's globals would leak into the tests beside it; and starting a process costs
seconds, so that one pair of processes plays many scenarios.

    python engine_worker.py FOLDER SCENARIOS RANK WORLD [ENGINE...]
"""

import hashlib
import json
import logging
import math
import runpy
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from stateset_ray.config import Config, load_config
from stateset_ray.errors import StatesetError
from stateset_ray.learner import deepspeed_engine, torch_engine
from stateset_ray.learner.batch import Item, PackedBatch, pack, plan
from stateset_ray.learner.engine import LearnerEngine, StepResult, build_engine
from stateset_ray.models import Hardware, load_model, state_tensors
from stateset_ray.policies.weights import decode
from stateset_ray.types import Sample

Meetings = runpy.run_path(str(Path(__file__).with_name("support_ranks.py")))["Meetings"]

# Large models are reduced in many buckets, and what comes after a bucket was closed can be lost: the
# gradient of an embedding that is also the output layer's, for one. So must this small one be.
deepspeed_engine._REDUCE_BUCKET = torch_engine._BUCKET = 20_000

CPU = Hardware("cpu", torch.float32, 1)
BF16 = Hardware("cpu", torch.bfloat16, 1)
TEMPERATURE = 1.3
GROUPS = [0, 0, 0, 1, 1, 1, 2, 3]
ENTROPY = 0.2

Cut = list[list[list[int]]]

ENGINES = {
    "torch": ["learner.engine=torch"],
    **{f"zero {stage}": [f"learner.zero_stage={stage}"] for stage in range(4)},
    "zero 1 offload": ["learner.zero_stage=1", "learner.offload=optimizer"],
    "zero 2 offload": ["learner.zero_stage=2", "learner.offload=optimizer"],
    "zero 3 offload": ["learner.zero_stage=3", "learner.offload=optimizer"],
    "zero 3 offload all": ["learner.zero_stage=3", "learner.offload=all"],
}
QUICK = ("torch", "zero 0", "zero 1", "zero 2", "zero 3", "zero 2 offload", "zero 3 offload all")
"""The others take part in the slow tests only."""

LORA = ["learner.lora.rank=4", "learner.lora.alpha=8"]


def config(*overrides: str) -> Config:
    # Without a first moment's decay, the optimizer's first moment after a step IS the clipped gradient.
    return load_config(
        None,
        [
            "model.name=tiny", "learner.betas=[0.0, 0.95]", "learner.max_grad_norm=1e6",
            "learner.logit_chunk=7", "learner.timeout=60", *overrides,
        ],
    )  # fmt: skip


def batch() -> list[Sample]:
    """Eight samples of unequal length, weight and advantage; two groups of three begin alike."""
    rng = np.random.default_rng(0)
    prefixes = {group: rng.integers(3, 259, n) for group, n in enumerate((9, 14, 3, 5))}
    rows = []
    for index, (group, n) in enumerate(zip(GROUPS, (12, 31, 8, 20, 9, 17, 5, 24), strict=True)):
        ids = np.concatenate([prefixes[group], rng.integers(3, 259, n)]).astype(np.int32)
        mask = np.zeros(len(ids), dtype=bool)
        mask[len(prefixes[group]) :] = True
        mask[len(ids) - n // 2 : len(ids) - n // 4] = False  # somebody else spoke in between
        advantages = np.where(mask, rng.normal(), 0).astype(np.float32)
        nothing = np.where(mask, 0, -1).astype(np.int32)
        logprobs = np.zeros(len(ids), np.float32)
        rows.append(Sample(ids, mask, logprobs, advantages, nothing, nothing, (1.0, 0.5)[index % 2]))
    return rows


DENOMINATOR = float(sum(sample.loss_mask.sum() for sample in batch()))


def cuts(world: int) -> dict[str, Cut]:
    """`[rank][micro_batch]` -> samples, in several ways that must not matter."""
    planned = plan([Item(len(s), g, 0) for s, g in zip(batch(), GROUPS, strict=True)], world, 60)
    if world == 1:
        return {
            "planned": planned,
            "1x8": [[list(range(8))]],
            "2x4": [[[0, 1, 2, 3], [4, 5, 6, 7]]],
            "4x2": [[[0, 1], [2, 3], [4, 5], [6, 7]]],
            "8x1": [[[i] for i in range(8)]],
            "with padding": [[[0, 1], [], [2, 3, 4, 5, 6, 7]]],
        }
    return {
        "planned": planned,
        "1 against 7": [[[6]], [[0, 1, 2, 3, 4, 5, 7]]],
        "all against none": [[list(range(4)), list(range(4, 8))], [[], []]],
        "4x1 each": [[[0], [1], [2], [3]], [[4], [5], [6], [7]]],
    }


def loss_of(engine: LearnerEngine, packed: PackedBatch, entropy: float = 0.0) -> torch.Tensor:
    scores = engine.score(packed, TEMPERATURE, entropy_gradient=entropy > 0)
    if packed.padding:
        return scores.logprobs.sum() * 0.0
    weights = torch.from_numpy(packed.weights)
    terms = -torch.from_numpy(packed.advantages) * scores.logprobs - entropy * scores.entropies
    return (terms * weights).sum() / DENOMINATOR


class Rank:
    """What the scenarios share: this rank's place, and where results go."""

    def __init__(self, folder: Path, rank: int, world: int, scenarios: str) -> None:
        self.folder, self.rank, self.world = folder, rank, world
        self.meetings = Meetings(folder, scenarios, rank, world)
        self.results: dict[str, Any] = {}

    def engine(self, *overrides: str, hardware: Hardware = CPU, model: str = "tiny") -> LearnerEngine:
        settings, whole = config(*overrides).learner, load_model(model, hardware)
        return build_engine(whole, settings, hardware, self.rank, self.world, self.meetings.master())

    def step(
        self, engine: LearnerEngine, cut: Cut, rate: float = 0.0, shared: bool = True, entropy: float = 0.0
    ) -> tuple[float, StepResult]:
        """(loss of the whole step, what the step did)."""
        samples = batch()
        total = torch.zeros(1, dtype=torch.float64)
        for indices in cut[self.rank]:
            groups = [GROUPS[i] for i in indices] if shared else None
            loss = loss_of(engine, pack([samples[i] for i in indices], groups), entropy)
            engine.backward(loss)
            total += loss.detach().double()
        return float(engine.all_reduce(total)), engine.step(rate)

    def keep_gradient(self, name: str, engine: LearnerEngine) -> None:
        self.keep(name, first_moments(engine))

    def keep_weights(self, name: str, engine: LearnerEngine) -> None:
        self.keep(name, {n: decode(a).float().numpy().copy() for n, a in engine.export().items()})

    def keep(self, name: str, arrays: dict[str, Any]) -> None:
        if self.rank == 0:
            np.savez(self.folder / f"{self.world} {name}.npz", **arrays)

    def finish(self, scenarios: str) -> None:
        path = self.folder / f"results-{scenarios}-{self.world}-{self.rank}.json"
        path.write_text(json.dumps(self.results))


def first_moments(engine: Any) -> dict[str, Any]:
    """The gradient that the last step applied, by name, on all ranks."""
    if hasattr(engine, "_engine") and engine._config.zero_stage > 0:
        from deepspeed.utils import safe_get_full_optimizer_state

        def moment(_: int, parameter: Any) -> Any:
            return safe_get_full_optimizer_state(parameter, "exp_avg")
    else:
        optimizer = engine._engine.optimizer if hasattr(engine, "_engine") else engine._optimizer
        held = [p for group in optimizer.param_groups for p in group["params"]]

        def moment(index: int, _: Any) -> Any:
            return optimizer.state[held[index]]["exp_avg"]

    trained = [(name, p) for name, p in engine._policy.named().items() if p.requires_grad]
    order = {id(p): index for index, p in enumerate(engine._policy.trained())}
    return {name: moment(order[id(p)], p).detach().float().numpy().copy() for name, p in trained}


def error_of(action: Callable[[], Any]) -> str:
    try:
        action()
    except StatesetError as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


def gradients(place: Rank, names: Sequence[str]) -> None:
    """The same gradient from every engine, however the step is cut, packed and chunked."""
    ways = cuts(place.world)
    for name in names:
        engine = place.engine(*ENGINES[name])
        for way, cut in ways.items():
            loss, result = place.step(engine, cut)
            place.keep_gradient(f"{name}, {way}", engine)
            place.results[f"{name}, {way}"] = [loss, result.grad_norm, result.applied]
        place.step(engine, ways["planned"], shared=False)
        place.keep_gradient(f"{name}, not shared", engine)
        place.step(engine, ways["planned"], entropy=ENTROPY)
        place.keep_gradient(f"{name}, entropy", engine)
        engine.destroy()


def variants(place: Rank, names: Sequence[str]) -> None:
    for name in names:
        for variant, more in {
            "chunk 1": ["learner.logit_chunk=1"],
            "chunk 1000": ["learner.logit_chunk=1000"],
            "checkpointing": ["learner.gradient_checkpointing=true"],
        }.items():
            engine = place.engine(*ENGINES[name], *more)
            place.step(engine, cuts(place.world)["planned"], entropy=ENTROPY)
            place.keep_gradient(f"{name}, {variant}", engine)
            engine.destroy()


def clipping(place: Rank, names: Sequence[str]) -> None:
    for name in names:
        engine = place.engine(*ENGINES[name], "learner.max_grad_norm=0.25")
        _, result = place.step(engine, cuts(place.world)["planned"])
        place.keep_gradient(f"{name}, clipped", engine)
        place.results[f"{name}, clipped"] = result.grad_norm
        engine.destroy()


def not_finite(place: Rank, names: Sequence[str]) -> None:
    """One rank's gradient overflows in one micro-batch: no rank may move, and the next step is sound."""
    samples, cut = batch(), cuts(place.world)["planned"]
    for index, name in enumerate(names):
        engine = place.engine(*ENGINES[name])
        place.step(engine, cut, 1e-3)
        before = engine.export()
        for micro_batch in range(2):
            spoilt = (math.nan, math.inf)[index % 2] if (micro_batch, place.rank) == (0, 0) else 1.0
            engine.backward(loss_of(engine, pack(samples[:2])) * spoilt)
        result = engine.step(1e-3)
        meant = engine.export()
        _, after = place.step(engine, cut, 1e-3)
        later = engine.export()
        place.results[f"{name}, not finite"] = {
            "norm": math.isfinite(result.grad_norm),
            "applied": [result.applied, after.applied],
            "stayed": all(np.array_equal(before[n], a) for n, a in meant.items()),
            "moved on": place.rank > 0 or any(not np.array_equal(before[n], a) for n, a in later.items()),
            "sound": all(np.isfinite(a).all() for a in later.values()),
        }
        engine.destroy()


def bfloat16(place: Rank, names: Sequence[str]) -> None:
    """Close to float32, and no buffer lost its precision."""
    from transformers import AutoModelForCausalLM

    from stateset_ray.models import local_folder

    plain = AutoModelForCausalLM.from_pretrained(local_folder("tiny"), dtype=torch.bfloat16)
    ids = torch.from_numpy(np.tile(batch()[0].token_ids, 8)).long()
    mask = np.arange(len(ids)) > 0
    numbers = np.where(mask, 0, -1).astype(np.int32)
    zeros = np.zeros(len(ids), np.float32)
    long = Sample(ids.numpy().astype(np.int32), mask, zeros, zeros, numbers, numbers)
    with torch.no_grad():
        every = torch.log_softmax(plain(ids[None]).logits[0, :-1].float() / TEMPERATURE, -1)
        wanted = every.gather(-1, ids[1:, None])[:, 0]
    for name in names:
        engine = place.engine(*ENGINES[name], hardware=BF16)
        with torch.no_grad():
            far = (engine.score(pack([long]), TEMPERATURE).logprobs - wanted).abs().max()
        _, result = place.step(engine, cuts(place.world)["planned"], 1e-3)
        place.keep_gradient(f"{name}, bfloat16", engine)
        place.keep_weights(f"{name}, bfloat16 weights", engine)
        place.results[f"{name}, bfloat16"] = [float(far), result.grad_norm, result.applied]
        engine.destroy()


def adapters(place: Rank, names: Sequence[str]) -> None:
    """Adapters under every engine: what is trained, what is published, what is the reference."""
    packed = pack(batch()[:3], GROUPS[:3])
    for name in names:
        more = ["learner.gradient_checkpointing=true"] if name == "zero 3" else []
        engine: Any = place.engine(*ENGINES[name], *LORA, *more)
        with torch.no_grad():
            base = engine.score(packed, TEMPERATURE).logprobs
        place.keep_weights(f"{name}, lora before", engine)
        for _ in range(3):
            place.step(engine, cuts(place.world)["planned"], 1e-2)
        with torch.no_grad():
            now = engine.score(packed, TEMPERATURE).logprobs
            with engine.reference_mode() as is_reference:
                reference = engine.score(packed, TEMPERATURE).logprobs
            again = engine.score(packed, TEMPERATURE).logprobs
            merged = load_model("tiny", CPU)
            engine.copy_into(merged)
            alone = place_alone(merged, packed)
        place.keep_weights(f"{name}, lora after", engine)
        described = engine._policy.describe()
        place.results[f"{name}, lora"] = {
            "is_reference": is_reference,
            "reference": float((reference - base).abs().max()),
            "moved": float((now - base).abs().max()),
            "again": float((now - again).abs().max()),
            "merged": float((now - alone).abs().max()),
            "trained": {n: shape for n, (shape, is_trained) in described.items() if is_trained},
            "held": sum(engine._policy.nbytes(p) for p in engine._policy.trained()),
        }
        if place.rank == 0:  # what was exported is what was copied
            exported = np.load(place.folder / f"{place.world} {name}, lora after.npz")
            tensors = state_tensors(merged)
            assert all(np.array_equal(tensors[n].numpy(), exported[n]) for n in tensors)
            assert set(exported) == set(tensors)
        engine.destroy()


def place_alone(model: Any, packed: PackedBatch) -> torch.Tensor:
    from stateset_ray.models import TreeRows

    logits = model(
        input_ids=torch.from_numpy(packed.input_ids),
        position_ids=torch.from_numpy(packed.position_ids),
        rows=TreeRows(packed.segments),
        use_cache=False,
    ).logits[0, torch.from_numpy(packed.logit_indices)]
    every = torch.log_softmax(logits / TEMPERATURE, -1)
    return every.gather(-1, torch.from_numpy(packed.target_ids)[:, None])[:, 0]


FREEZE = ["learner.freeze=['model.embed_tokens.*', 'model.layers.0.*']"]
SAVED = {
    **{
        name: ENGINES[name]
        for name in ("torch", "zero 0", "zero 1", "zero 2", "zero 3", "zero 3 offload all")
    },
    "zero 2 offload": ENGINES["zero 2 offload"],
    "zero 1 lora": [*ENGINES["zero 1"], *LORA],
    "zero 3 lora": [*ENGINES["zero 3"], *LORA],
    "torch lora": [*ENGINES["torch"], *LORA],
    "zero 2 frozen": [*ENGINES["zero 2"], *FREEZE],
    "zero 1 bfloat16": ENGINES["zero 1"],
    "torch bfloat16": ENGINES["torch"],
}
MOMENTS = "learner.betas=[0.9, 0.95]"


def hardware_of(name: str) -> Hardware:
    return BF16 if "bfloat16" in name else CPU


def fresh(place: Rank, name: str, *overrides: str) -> LearnerEngine:
    """An engine whose weights are wrong everywhere: what is right afterwards was loaded."""
    model = load_model("tiny", hardware_of(name))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.5)
    settings = config(*SAVED[name], MOMENTS, *overrides).learner
    return build_engine(model, settings, hardware_of(name), place.rank, place.world, place.meetings.master())


def saving(place: Rank, names: Sequence[str]) -> None:
    """Two steps, a state, two more; and again from the state alone."""
    cut = cuts(place.world)["planned"]
    for name, overrides in ((name, SAVED[name]) for name in names):
        folder = place.folder / f"state-{place.world}-{name}"
        engine = place.engine(*overrides, MOMENTS, hardware=hardware_of(name))
        for _ in range(2):
            place.step(engine, cut, 1e-3)
        engine.save(folder, "engine")
        straight = [place.step(engine, cut, 1e-3) for _ in range(2)]
        place.keep_weights(f"{name}, straight", engine)
        engine.destroy()
        engine = fresh(place, name)
        engine.load(folder, "engine")
        used = error_of(lambda: engine.load(folder, "engine"))  # noqa: B023
        loaded = [place.step(engine, cut, 1e-3) for _ in range(2)]
        place.keep_weights(f"{name}, loaded", engine)
        place.results[f"{name}, saved"] = {
            "straight": [(loss, r.grad_norm) for loss, r in straight],
            "loaded": [(loss, r.grad_norm) for loss, r in loaded],
            "used": used,
            "files": sorted(path.name for path in (folder / "engine").iterdir()),
        }
        engine.destroy()


def moved(place: Rank, names: Sequence[str]) -> None:
    """Continue what another number of ranks began."""
    other = 3 - place.world
    records: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: records.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("stateset_ray").addHandler(handler)
    logging.getLogger("stateset_ray").setLevel(logging.INFO)
    for name in names:
        folder = place.folder / f"state-{other}-{name}"
        before = fingerprint(folder)
        engine = fresh(place, name)
        engine.load(folder, "engine")
        losses = [place.step(engine, cuts(place.world)["planned"], 1e-3) for _ in range(2)]
        place.keep_weights(f"{name}, moved", engine)
        place.results[f"{name}, moved"] = {
            "losses": [(loss, r.grad_norm) for loss, r in losses],
            "log": list(records),
            "untouched": before == fingerprint(folder),
            "left": [path.name for path in place.folder.glob(f"{folder.name}.tmp-*")],
        }
        records.clear()
        engine.destroy()


def fingerprint(folder: Path) -> dict[str, str]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def clip_after_loading(place: Rank) -> None:
    """DeepSpeed would go on with the limit that is in the state."""
    for name in ("torch", "zero 1", "zero 3 lora"):
        engine = fresh(place, name, "learner.max_grad_norm=0.05")
        engine.load(place.folder / f"state-{place.world}-{name}", "engine")
        place.step(engine, cuts(place.world)["planned"], 0.0)
        before = first_moments(engine)
        place.step(engine, cuts(place.world)["planned"], 0.0)
        # m' - 0.9 m = 0.1 g
        gradient = [10 * (m - 0.9 * before[n]) for n, m in first_moments(engine).items()]
        place.results[f"{name}, clip after loading"] = float(sum((g**2).sum() for g in gradient)) ** 0.5
        engine.destroy()


def refused(place: Rank) -> None:
    """States that cannot be continued, with words, and nothing touched."""
    from transformers import AutoConfig, AutoModelForCausalLM

    from stateset_ray.models import local_folder

    found = place.results
    state = place.folder / "state-1-zero 1"
    before = fingerprint(state)
    engine = fresh(place, "zero 2")
    found["another stage"] = error_of(lambda: engine.load(state, "engine"))
    found["nowhere"] = error_of(lambda: engine.load(place.folder / "nowhere", "engine"))
    engine.destroy()
    engine = fresh(place, "torch")
    found["another engine"] = error_of(lambda: engine.load(state, "engine"))
    engine.destroy()
    engine = place.engine(*ENGINES["zero 1"], hardware=BF16)
    found["another dtype"] = error_of(lambda: engine.load(state, "engine"))
    engine.destroy()
    engine = fresh(place, "zero 1 lora")
    found["other adapters"] = error_of(lambda: engine.load(state, "engine"))
    engine.destroy()
    small = AutoConfig.from_pretrained(local_folder("tiny"))
    small.num_hidden_layers = 1
    if getattr(small, "layer_types", None):
        small.layer_types = small.layer_types[:1]
    AutoModelForCausalLM.from_config(small).save_pretrained(place.folder / "small")
    engine = place.engine(*ENGINES["zero 1"], model=str(place.folder / "small"))
    found["another model"] = error_of(lambda: engine.load(state, "engine"))
    engine.destroy()
    found["untouched"] = before == fingerprint(state)

    for name, other in (("missing share", 1), ("missing share of two", 2)):
        broken = place.folder / f"broken-{other}"
        shutil.copytree(place.folder / f"state-{other}-zero 1", broken)
        next((broken / "engine").glob("*_optim_states.pt")).unlink()
        engine = fresh(place, "zero 1")
        found[name] = error_of(lambda: engine.load(broken, "engine"))  # noqa: B023
        engine.destroy()
    broken = place.folder / "unreadable"
    shutil.copytree(place.folder / "state-2-zero 1", broken)
    next((broken / "engine").glob("*_optim_states.pt")).write_bytes(b"not a state")
    engine = fresh(place, "zero 1")
    found["unreadable"] = error_of(lambda: engine.load(broken, "engine"))
    found["left"] = [path.name for path in place.folder.glob("unreadable.tmp-*")]
    engine.destroy()


SAVED_QUICK = ("torch", "zero 0", "zero 1", "zero 3 lora")
REST = [name for name in ENGINES if name not in QUICK]
VARIED = ("torch", "zero 3")
VARIED_ALL = ("torch", "zero 0", "zero 1", "zero 2", "zero 3")
CLIPPED = ("torch", "zero 0", "zero 1", "zero 2", "zero 3")
CLIPPED_REST = [name for name in ENGINES if name not in CLIPPED]
ADAPTED = ("torch", "zero 2", "zero 3")
ADAPTED_REST = [name for name in ENGINES if name not in ADAPTED]
BFLOAT16 = {1: ("torch", "zero 1"), 2: ("zero 1", "zero 2", "zero 3")}
SAVED_REST = [name for name in SAVED if name not in SAVED_QUICK]
SCENARIOS: dict[str, Callable[[Rank], None]] = {
    "gradients": lambda place: gradients(place, QUICK),
    "variants": lambda place: variants(place, VARIED),
    "clipping": lambda place: clipping(place, CLIPPED),
    "not_finite": lambda place: not_finite(place, CLIPPED),
    "bfloat16": lambda place: bfloat16(place, BFLOAT16[place.world]),
    "adapters": lambda place: adapters(place, ADAPTED),
    "saving": lambda place: saving(place, SAVED_QUICK),
    "moved": lambda place: moved(place, SAVED_QUICK),
    "clip_after_loading": clip_after_loading,
    "refused": refused,
    "gradients_rest": lambda place: gradients(place, REST),
    "variants_rest": lambda place: variants(place, ("zero 0", "zero 1", "zero 2")),
    "clipping_rest": lambda place: clipping(place, CLIPPED_REST),
    "not_finite_rest": lambda place: not_finite(place, CLIPPED_REST),
    "adapters_rest": lambda place: adapters(place, ADAPTED_REST),
    "saving_rest": lambda place: saving(place, SAVED_REST),
    "moved_rest": lambda place: moved(place, SAVED_REST),
}


def main() -> None:
    folder, scenarios, rank, world = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
    global CLIPPED, QUICK
    if chosen := sys.argv[5:]:
        QUICK, CLIPPED = tuple(chosen), tuple(name for name in CLIPPED if name in chosen)
    torch.set_num_threads(1)
    place = Rank(folder, rank, world, scenarios)
    for scenario in scenarios.split(","):
        started = time.process_time()
        SCENARIOS[scenario](place)
        print(f"{scenario}: {time.process_time() - started:.1f} s of computing", file=sys.stderr)
    place.finish(scenarios)


if __name__ == "__main__":
    main()
