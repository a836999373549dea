"""Both engines against plain transformers: ZeRO 0 to 3 and plain PyTorch, one rank and two, cut anyhow."""

import json
import math
import os
import runpy
import subprocess
import sys
import time
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from stateset_ray.config import LearnerConfig, LoraConfig, load_config
from stateset_ray.errors import ConfigError, ModelError
from stateset_ray.learner import policy_model
from stateset_ray.learner.adapters import Adapters
from stateset_ray.learner.batch import pack
from stateset_ray.learner.gradients import clip
from stateset_ray.learner.policy_model import PolicyModel
from stateset_ray.models import Hardware, load_model, local_folder

pytestmark = pytest.mark.timeout(500)

ROOT = Path(__file__).parents[2]
WORKER = Path(__file__).with_name("engine_worker.py")
CPU = Hardware("cpu", torch.float32, 1)
worker = runpy.run_path(str(WORKER))
Weights = dict[str, np.ndarray[Any, Any]]

BUGS = "gradients,clipping,not_finite"
OTHERS = "variants,bfloat16,adapters,saving"
REST = "gradients_rest,clipping_rest,not_finite_rest,variants_rest,adapters_rest,saving_rest"
THEN = {1: "moved,clip_after_loading,refused", 2: "moved"}
CUTS = [(world, way) for world in (1, 2) for way in worker["cuts"](world)]


def every(quick: str, of: str = "ENGINES") -> list[Any]:
    """All engines, or all that are saved; those that are not in the quick list are slow."""
    slow = (name for name in worker[of] if name not in worker[quick])
    return [*worker[quick], *(pytest.param(name, marks=pytest.mark.slow) for name in slow)]


class Played:
    """What the processes of one group wrote."""

    def __init__(self, folder: Path, scenarios: str, world: int) -> None:
        self.folder, self.world = folder, world
        results = (folder / f"results-{scenarios}-{world}-{rank}.json" for rank in range(world))
        self.ranks = [json.loads(path.read_text()) for path in results]

    def arrays(self, name: str) -> Weights:
        return dict(np.load(self.folder / f"{self.world} {name}.npz"))


def _play(folder: Path, scenarios: dict[int, str], *engines: str) -> dict[int, Played]:
    """World size -> what its ranks did, all worlds at once, with these engines or all of the quick ones."""
    local_folder("tiny")  # built once, before the ranks ask for it together
    path = os.pathsep.join(filter(None, (os.environ.get("PYTHONPATH"), str(ROOT))))
    environment = os.environ | {"PYTHONPATH": path, "PYTHONWARNINGS": "ignore", "OMP_NUM_THREADS": "1"}
    running = []
    for world, rank in [(size, rank) for size in scenarios for rank in range(size)]:
        log = (folder / f"log-{world}-{rank}").open("w+")
        command = [sys.executable, str(WORKER), str(folder), scenarios[world], str(rank), str(world)]
        command += engines
        running.append((subprocess.Popen(command, cwd=ROOT, env=environment, stdout=log, stderr=log), log))
    try:
        deadline = time.monotonic() + 450
        while any(process.poll() is None for process, _ in running) and time.monotonic() < deadline:
            if any(process.poll() for process, _ in running):
                break  # the others would wait for the one that failed
            time.sleep(0.1)
    finally:
        failed = []
        for process, log in running:
            unfinished = process.poll() is None
            process.kill()
            log.seek(0)
            text = log.read()[-3000:]
            log.close()
            if process.wait():
                failed.append("was waiting" if unfinished else text)
        assert not failed, "\n\n".join(failed)
    return {world: Played(folder, scenarios[world], world) for world in scenarios}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("engines")


@pytest.fixture(scope="module")
def played(folder: Path, request: pytest.FixtureRequest) -> dict[int, Played]:
    items = [item for item in request.session.items if item.path == Path(__file__)]
    if not all(item.name.startswith("test_bug_") for item in items):
        return _play(folder, dict.fromkeys((1, 2), f"{BUGS},{OTHERS}"))
    # Whoever wants single tests of known bugs (one mutation after the other) need not wait for the rest.
    engines = sorted({str(item.callspec.params["name"]) for item in items})  # type: ignore[attr-defined]
    return _play(folder, dict.fromkeys((1, 2), BUGS), *engines)


@pytest.fixture(scope="module")
def moved(folder: Path, played: dict[int, Played]) -> dict[int, Played]:
    return _play(folder, THEN)


@pytest.fixture(scope="module")
def played_rest(folder: Path) -> dict[int, Played]:
    return _play(folder, dict.fromkeys((1, 2), REST))


@pytest.fixture(scope="module")
def moved_rest(folder: Path, played_rest: dict[int, Played]) -> dict[int, Played]:
    return _play(folder, dict.fromkeys((1, 2), "moved_rest"))


@pytest.fixture
def of(request: pytest.FixtureRequest) -> Any:
    """Who played an engine: the slow ones play elsewhere."""

    def find(name: str, which: str, quick: str) -> dict[int, Played]:
        found: dict[int, Played] = request.getfixturevalue(
            which if name in worker[quick] else f"{which}_rest"
        )
        return found

    return find


@cache
def plain(entropy: float = 0.0) -> tuple[float, Weights]:
    """(loss, gradient), row by row with transformers' own forward and attention, in float64."""
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(1)
    model = AutoModelForCausalLM.from_pretrained(local_folder("tiny"), dtype=torch.float64)
    samples = worker["batch"]()
    total = torch.zeros((), dtype=torch.float64)
    for sample in samples:
        ids = torch.from_numpy(sample.token_ids).long()
        every = torch.log_softmax(model(ids[None]).logits[0, :-1] / worker["TEMPERATURE"], -1)
        chosen = every.gather(-1, ids[1:, None])[:, 0]
        entropies = -(every.exp() * every).sum(-1)
        mask, advantages = (torch.from_numpy(a)[1:] for a in (sample.loss_mask, sample.advantages))
        total = total + ((-advantages * chosen - entropy * entropies) * mask).sum() * sample.weight
    total = total / sum(int(sample.loss_mask.sum()) for sample in samples)
    total.backward()
    return total.item(), {name: p.grad.float().numpy() for name, p in model.named_parameters()}


def norm_of(gradient: Weights) -> float:
    return math.sqrt(sum(float((g.astype(np.float64) ** 2).sum()) for g in gradient.values()))


def distance(left: Weights, right: Weights) -> float:
    assert left.keys() == right.keys()
    return max(float(np.abs(left[name] - right[name]).max()) for name in left)


def assert_the_gradient(got: Weights, entropy: float = 0.0) -> None:
    _, wanted = plain(entropy)
    # Relative to the largest entry, so that small gradients cannot hide an error.
    assert distance(got, wanted) < 1e-5 * max(float(np.abs(g).max()) for g in wanted.values())


@pytest.mark.parametrize("name", every("QUICK"))
def test_bug_25_same_gradient_for_any_cut_and_unequal_ranks(of: Any, name: str) -> None:
    for world, way in CUTS:
        played = of(name, "played", "QUICK")[world]
        assert_the_gradient(played.arrays(f"{name}, {way}"))
        for rank in played.ranks:
            loss, norm, applied = rank[f"{name}, {way}"]
            assert loss == pytest.approx(plain()[0], rel=1e-5)
            assert norm == pytest.approx(norm_of(plain()[1]), rel=1e-5)
            assert applied


@pytest.mark.parametrize("name", ["zero 0", "zero 1", "zero 2", "zero 3"])
def test_bug_26_three_micro_batches_one_step_full_sum_in_every_stage(of: Any, name: str) -> None:
    assert len(worker["cuts"](1)["planned"][0]) >= 3
    for way in ("planned", "4x2", "8x1"):
        assert_the_gradient(of(name, "played", "QUICK")[1].arrays(f"{name}, {way}"))


@pytest.mark.parametrize("name", every("CLIPPED"))
def test_bug_47_not_finite_no_step_applied_and_the_next_one_sound(of: Any, name: str) -> None:
    for world in (1, 2):
        for rank in of(name, "played", "CLIPPED")[world].ranks:
            assert rank[f"{name}, not finite"] == {
                "norm": False, "applied": [False, True], "stayed": True, "moved on": True, "sound": True,
            }  # fmt: skip


@pytest.mark.parametrize("name", every("CLIPPED"))
def test_bug_48_clipping_equal_in_both_engines(of: Any, name: str) -> None:
    whole = norm_of(plain()[1])
    for world in (1, 2):
        played = of(name, "played", "CLIPPED")[world]
        assert played.ranks[-1][f"{name}, clipped"] == pytest.approx(whole, rel=1e-5)  # before clipping
        clipped = played.arrays(f"{name}, clipped")
        assert norm_of(clipped) == pytest.approx(0.25, rel=1e-5)
        assert distance(clipped, {n: g * (0.25 / whole) for n, g in plain()[1].items()}) < 1e-7
        assert 0.25 < whole < 1  # the limit that DeepSpeed takes if none is given would not act


@pytest.mark.parametrize("name", ["zero 2", "zero 3", "torch"])
def test_bug_49_unequal_micro_batch_counts_finish(of: Any, name: str) -> None:
    from stateset_ray.learner.batch import Item, plan

    counts = [sum(map(bool, mine)) for mine in worker["cuts"](2)["all against none"]]
    assert counts == [2, 0]
    uneven = plan([Item(60), Item(6), Item(55)], ranks=2, budget=60)
    assert len({len(mine) for mine in uneven}) == 1
    assert_the_gradient(of(name, "played", "QUICK")[2].arrays(f"{name}, all against none"))


@pytest.mark.parametrize("name", every("QUICK"))
@pytest.mark.parametrize("world", [1, 2])
def test_a_shared_prefix_and_an_entropy_bonus(of: Any, name: str, world: int) -> None:
    assert_the_gradient(of(name, "played", "QUICK")[world].arrays(f"{name}, not shared"))
    assert_the_gradient(of(name, "played", "QUICK")[world].arrays(f"{name}, entropy"), worker["ENTROPY"])


@pytest.mark.parametrize("name", every("VARIED", "VARIED_ALL"))
@pytest.mark.parametrize("variant", ["chunk 1", "chunk 1000", "checkpointing"])
def test_chunks_and_checkpointing_change_nothing(of: Any, name: str, variant: str) -> None:
    for world in (1, 2):
        played = of(name, "played", "VARIED")[world]
        assert_the_gradient(played.arrays(f"{name}, {variant}"), worker["ENTROPY"])


@pytest.mark.parametrize(("world", "name"), [(w, n) for w in (1, 2) for n in worker["BFLOAT16"][w]])
def test_bfloat16_is_close_and_keeps_its_frequencies(
    played: dict[int, Played], name: str, world: int
) -> None:
    far, norm, applied = played[world].ranks[0][f"{name}, bfloat16"]
    assert far < 1e-5  # the engine computes what transformers computes in bfloat16
    assert norm == pytest.approx(norm_of(plain()[1]), rel=1e-2)
    assert applied
    got = played[world].arrays(f"{name}, bfloat16")
    assert distance(got, plain()[1]) < 0.02 * max(float(np.abs(g).max()) for g in plain()[1].values())


@pytest.mark.parametrize("name", every("ADAPTED"))
@pytest.mark.parametrize("world", [1, 2])
def test_adapters(of: Any, name: str, world: int) -> None:
    for rank in (played := of(name, "played", "ADAPTED")[world]).ranks:
        found = rank[f"{name}, lora"]
        assert found["moved"] > 0.1
        assert found["is_reference"]
        assert found["reference"] < 1e-6  # with the adapters off, the policy is the base, and
        assert found["again"] == 0  # afterwards they are on again
        assert found["merged"] < 2e-6  # what is published computes what the adapters do
        assert all("lora_" in trained for trained in found["trained"])
        numbers = sum(math.prod(shape) for shape in found["trained"].values())
        assert found["held"] == 4 * numbers  # the optimizer holds the adapters and nothing else
    before, after = (played.arrays(f"{name}, lora {when}") for when in ("before", "after"))
    assert after.keys() == plain()[1].keys()  # the names of a model without adapters
    changed = {n for n in after if not np.array_equal(before[n], after[n])}
    assert changed == {n for n in after if n.endswith("_proj.weight")}


@pytest.mark.parametrize("name", every("SAVED_QUICK", "SAVED"))
@pytest.mark.parametrize("world", [1, 2])
def test_resume_is_exact(of: Any, name: str, world: int) -> None:
    played = of(name, "played", "SAVED_QUICK")[world]
    for rank in played.ranks:
        found = rank[f"{name}, saved"]
        assert found["loaded"] == found["straight"]
        assert "build a new learner" in found["used"]
        assert "latest" not in found["files"]
    assert distance(played.arrays(f"{name}, loaded"), played.arrays(f"{name}, straight")) == 0


@pytest.mark.parametrize("name", every("SAVED_QUICK", "SAVED"))
@pytest.mark.parametrize("world", [1, 2])
def test_another_number_of_ranks_continues(of: Any, name: str, world: int) -> None:
    began = of(name, "played", "SAVED_QUICK")[3 - world]
    goes_on = of(name, "moved", "SAVED_QUICK")[world]
    # In bfloat16 other partial sums round elsewhere: at most in the last bit of a weight near 1.
    near, rounding = (1e-3, 2**-7) if "bfloat16" in name else (1e-5, 1e-5)
    for rank in goes_on.ranks:
        found = rank[f"{name}, moved"]
        for ours, theirs in zip(found["losses"], began.ranks[0][f"{name}, saved"]["straight"], strict=True):
            assert ours == pytest.approx(theirs, rel=near)
        assert found["untouched"]
        assert found["left"] == []
    assert distance(goes_on.arrays(f"{name}, moved"), began.arrays(f"{name}, straight")) <= rounding
    said = goes_on.ranks[0][f"{name}, moved"]["log"]
    converted = name.startswith("zero") and name != "zero 0"
    assert [line.partition(" in ")[0] for line in said] == converted * [
        f"the engine state of {3 - world} ranks was converted for {world}"
    ]


def test_the_configuration_wins_over_the_clipping_in_a_state(moved: dict[int, Played]) -> None:
    for name in ("torch", "zero 1", "zero 3 lora"):
        assert moved[1].ranks[0][f"{name}, clip after loading"] == pytest.approx(0.05, rel=1e-3)


def test_states_that_cannot_be_continued_are_refused(moved: dict[int, Played]) -> None:
    found = moved[1].ranks[0]
    assert "zero_stage = 1, this learner has learner.zero_stage = 2" in found["another stage"]
    assert "set learner.zero_stage = 1" in found["another stage"]
    assert "set learner.engine = 'deepspeed'" in found["another engine"]
    assert "set model.dtype = 'float32'" in found["another dtype"]
    assert "no complete engine state" in found["nowhere"]
    for name in ("another model", "other adapters"):
        assert "the engine state is of another model" in found[name]
    assert "0 of 1 ranks" in found["missing share"]
    assert "1 of 2 ranks" in found["missing share of two"]
    assert "cannot be converted from 2 ranks to 1" in found["unreadable"]
    assert "set learner.ranks = 2" in found["unreadable"]
    assert found["left"] == []
    assert found["untouched"]


def settings(*overrides: str) -> LearnerConfig:
    return load_config(None, ["model.name=tiny", *overrides]).learner


def test_no_more_logits_than_a_chunk_exist_at_a_time() -> None:
    policy = PolicyModel(load_model("tiny", CPU), settings("learner.logit_chunk=5"))
    rows: list[int] = []
    policy.head.lm_head.register_forward_hook(lambda *call: rows.append(call[2].shape[0]))
    packed = pack(worker["batch"]())
    logprobs, entropies = policy.score(policy, packed, 1.0, False)
    assert logprobs.shape == entropies.shape == packed.target_ids.shape
    assert logprobs.dtype == entropies.dtype == torch.float32
    assert logprobs.requires_grad and not entropies.requires_grad
    chunks = -(-len(packed.target_ids) // 5)
    assert len(rows) == chunks and max(rows) == 5
    logprobs.sum().backward()
    assert len(rows) == 2 * chunks and max(rows) == 5  # computed again, once each

    policy = PolicyModel(load_model("tiny", CPU), settings("learner.logit_chunk=1000"))
    rows.clear()
    policy.head.lm_head.register_forward_hook(lambda *call: rows.append(call[2].shape[0]))
    policy.score(policy, packed, 1.0, False)[0].sum().backward()
    assert rows == [len(packed.target_ids)]  # a single chunk is kept


def _random_model(family: str) -> Any:
    import transformers

    small = {
        "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 128,
        "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    }  # fmt: skip
    special = {
        "Granite": {"logits_scaling": 3.0},
        "Cohere": {"logit_scale": 0.25},
        "Gemma2": {
            "final_logit_softcapping": 2.0,
            "layer_types": ["full_attention"] * 2,
            "attn_logit_softcapping": None,
        },
        "SmolLM3": {"layer_types": ["full_attention"] * 2},
    }.get(family, {})
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**small, **special)
    config._attn_implementation = "stateset_ragged"
    model = getattr(transformers, f"{family}ForCausalLM")(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(8)  # so that caps and scales matter
    return model.eval()


@pytest.mark.parametrize(
    "family", ["Llama", "Qwen2", "Qwen3", "Mistral", "SmolLM3", "Gemma", "Gemma2", "Granite", "Cohere"]
)
def test_what_a_model_does_to_its_logits_is_done_here_too(family: str) -> None:
    from stateset_ray.models import TreeRows

    load_model("tiny", CPU)  # registers the attention
    model = _random_model(family)
    ids = torch.arange(3, 40)
    rows = TreeRows(((37, -1),))
    with torch.no_grad():
        logits = model(input_ids=ids[None], position_ids=torch.arange(37)[None], rows=rows).logits[0, :-1]
        wanted = torch.log_softmax(logits / 1.3, -1)
        policy = PolicyModel(model, settings("learner.logit_chunk=8"))
        mask = np.arange(37) > 0
        numbers, zeros = np.where(mask, 0, -1).astype(np.int32), np.zeros(37, np.float32)
        Sample = type(worker["batch"]()[0])
        packed = pack([Sample(ids.numpy().astype(np.int32), mask, zeros, zeros, numbers, numbers)])
        logprobs, entropies = policy.score(policy, packed, 1.3, False)
    assert torch.allclose(logprobs, wanted.gather(-1, ids[1:, None])[:, 0], atol=1e-5)
    assert torch.allclose(entropies, -(wanted.exp() * wanted).sum(-1), atol=1e-5)


def test_a_model_that_does_something_unknown_to_its_logits_is_refused() -> None:
    from transformers import LlamaForCausalLM

    class Biased(LlamaForCausalLM):
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            output = super().forward(*args, **kwargs)
            output.logits = output.logits + torch.arange(output.logits.shape[-1])
            return output

    model = load_model("tiny", CPU)
    model.__class__ = Biased
    with pytest.raises(ModelError, match="between its output layer and its logits"):
        PolicyModel(model, settings())


def test_freezing_by_name() -> None:
    policy = PolicyModel(
        load_model("tiny", CPU), settings("learner.freeze=['model.layers.[0]*', 'lm_head.weight']")
    )
    frozen = {name for name, p in policy.named().items() if not p.requires_grad}
    assert "model.embed_tokens.weight" in frozen  # tied: either name will do
    assert all(name.startswith(("model.layers.0.", "model.embed_tokens.")) for name in frozen)
    assert len(policy.trained()) == len(policy.named()) - len(frozen) > 0
    with pytest.raises(ConfigError, match=r"(?s)names no parameter.*model\.layers\.0\.mlp\.up_proj\.weight"):
        PolicyModel(load_model("tiny", CPU), settings("learner.freeze=['model.layers.0.mlp.upproj.weight']"))
    with pytest.raises(ConfigError, match="leaves nothing to train"):
        PolicyModel(load_model("tiny", CPU), settings("learner.freeze=['*']"))


def test_adapters_that_cannot_be_put_in() -> None:
    with pytest.raises(ConfigError, match=r"(?s)no linear module.*q_proj"):
        PolicyModel(
            load_model("tiny", CPU), settings("learner.lora.rank=2", "learner.lora.targets=['qproj']")
        )
    with pytest.raises(ConfigError, match="no linear module"):  # the output layer gets none
        PolicyModel(
            load_model("tiny", CPU), settings("learner.lora.rank=2", "learner.lora.targets=['lm_head']")
        )
    code = (
        "import sys; sys.modules['peft'] = None\n"
        "import torch\n"
        "from stateset_ray.config import LearnerConfig\n"
        "from stateset_ray.learner.policy_model import PolicyModel\n"
        "from stateset_ray.models import Hardware, load_model\n"
        "config = LearnerConfig(lora={'rank': 2})\n"
        "PolicyModel(load_model('tiny', Hardware('cpu', torch.float32, 1)), config)\n"
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env=environment,
        timeout=100,
        check=False,
    )
    assert "pip install 'stateset-ray[lora]'" in done.stderr


def test_adapters_at_chosen_modules() -> None:
    chosen = settings("learner.lora.rank=2", "learner.lora.targets=['q_proj', 'model.layers.1.mlp.up_proj']")
    policy = PolicyModel(load_model("tiny", CPU), chosen)
    trained = {n.partition(".lora_")[0] for n, p in policy.named().items() if p.requires_grad}
    layers = len(policy.backbone.layers)
    assert trained == {
        "model.layers.1.mlp.up_proj", *(f"model.layers.{i}.self_attn.q_proj" for i in range(layers))
    }  # fmt: skip


def test_an_entropy_without_gradient_is_computed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    rows: list[int] = []
    real = policy_model._entropies

    def counted(logits: torch.Tensor, temperature: float) -> torch.Tensor:
        rows.append(len(logits))
        return real(logits, temperature)

    monkeypatch.setattr(policy_model, "_entropies", counted)
    scores = policy_model.TokenScores(torch.nn.Linear(4, 9, bias=False), lambda logits: logits, chunk=5)
    hidden = torch.randn(12, 4, requires_grad=True)
    logprobs, entropies = scores(hidden, torch.arange(12) % 9, 1.0, False)
    logprobs.sum().backward()  # computes each chunk again, but what no gradient needs
    assert sum(rows) == len(entropies) == 12
    assert hidden.grad is not None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_adapter_computes_its_formula(dtype: torch.dtype) -> None:
    hardware = Hardware("cpu", dtype, 1)
    adapters = Adapters(load_model("tiny", hardware), LoraConfig(rank=4, alpha=3))
    layer = next(iter(adapters._layers.values()))
    a, b = (p.requires_grad_() for p in (layer.lora_A["default"].weight, layer.lora_B["default"].weight))
    drawn = torch.Generator().manual_seed(0)
    torch.nn.init.normal_(b, generator=drawn)
    x = torch.randn(2, 5, a.shape[1], generator=drawn).to(dtype).requires_grad_()
    upstream = torch.randn(2, 5, b.shape[0], generator=drawn).to(dtype)
    y = layer(x)
    found = torch.autograd.grad(y, (x, a, b), upstream)
    w, a64, b64, x64 = (t.detach().double().requires_grad_() for t in (layer.base_layer.weight, a, b, x))
    y64 = x64 @ w.T + 3 / 4 * (x64 @ a64.T @ b64.T)
    expected = torch.autograd.grad(y64, (x64, a64, b64), upstream.double())
    near = 1e-5 if dtype == torch.float32 else 0.03
    for ours, formula in zip((y.detach(), *found), (y64.detach(), *expected), strict=True):
        assert float((ours.double() - formula).abs().max()) < near * float(formula.abs().max())
    with adapters.off():
        assert torch.equal(layer(x), layer.base_layer(x))


def test_adapters_begin_alike_whatever_was_drawn_before() -> None:
    def first(seed: int) -> torch.Tensor:
        torch.manual_seed(seed)
        policy = PolicyModel(load_model("tiny", CPU), settings("learner.lora.rank=2"))
        after = torch.rand(1)
        torch.manual_seed(seed)
        assert torch.equal(after, torch.rand(1))  # and nothing is drawn from the run's own numbers
        return torch.cat([p.flatten() for p in policy.trained()])

    assert torch.equal(first(1), first(2))


def test_clipping_by_hand() -> None:
    def parameter(*gradient: float) -> torch.Tensor:
        one = torch.zeros(len(gradient))
        one.grad = torch.tensor(gradient)
        return one

    first, second, without = parameter(3.0, 0.0), parameter(4.0), torch.zeros(2)
    result = clip([first, second, without], 1.0)
    assert (result.grad_norm, result.applied) == (5.0, True)
    assert first.grad is not None and first.grad.tolist() == pytest.approx([3 / 5.000001, 0.0], rel=1e-6)
    assert without.grad is None
    assert clip([parameter(3.0)], 3.1).grad_norm == 3.0
    bad = parameter(1.0, math.inf)
    assert clip([bad, first], 1.0).applied is False
    assert bad.grad is None and first.grad is None
    many = torch.zeros(3_000_000)
    many.grad = torch.full_like(many, 1e-3)
    assert clip([many], 1e9).grad_norm == pytest.approx(1e-3 * math.sqrt(3e6), rel=1e-6)


def test_stage_0_in_bfloat16_is_refused() -> None:
    from stateset_ray.learner.deepspeed_engine import DeepSpeedEngine

    bfloat16 = Hardware("cpu", torch.bfloat16, 1)
    with pytest.raises(ConfigError, match="wrong first step in DeepSpeed"):
        DeepSpeedEngine(
            load_model("tiny", bfloat16), settings("learner.zero_stage=0"), bfloat16, 0, 1, ("127.0.0.1", 0)
        )
