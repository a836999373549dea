"""What is sent with a job, and what never is."""

from __future__ import annotations

import os
import shutil
import subprocess
import zipfile
from pathlib import Path

import pytest

from stateset_ray.errors import ConfigError
from stateset_ray.packing import collect, write_archive


def make(root: Path, *names: str, **contents: str) -> None:
    """Files by name; a name that ends in a slash is a folder."""
    for name in names:
        path = root / name
        if name.endswith("/"):
            path.mkdir(parents=True, exist_ok=True)
        else:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(contents.get(name, "x"))


def sent(root: Path, **options: object) -> set[str]:
    return {path.as_posix() for path in collect(root, **options).files}  # type: ignore[arg-type]


def test_runs_environments_caches_and_git_never_travel(tmp_path: Path) -> None:
    make(
        tmp_path, "config.toml", "agent/env.py", "runs/demo/model.safetensors", "sub/runs/old.bin",
        ".git/HEAD", ".venv/bin/python",
        "my-env/pyvenv.cfg", "my-env/lib/torch.so", "agent/__pycache__/env.pyc",
        "left.pyc", ".mypy_cache/x",
    )  # fmt: skip
    (tmp_path / ".rayignore").write_text("!runs\n!.venv\n!my-env\n")  # not even if one asks for it
    assert sent(tmp_path) == {".rayignore", "agent/env.py", "config.toml"}


def test_secrets_never_travel(tmp_path: Path) -> None:
    make(tmp_path, "config.toml", ".ray-token-17", ".env", "agent/.env", "auth_token")
    (tmp_path / ".rayignore").write_text("!.env\n")
    assert sent(tmp_path) == {".rayignore", "config.toml"}


def test_where_runs_go_does_not_travel_whatever_it_is_called(tmp_path: Path) -> None:
    make(tmp_path, "config.toml", "out/demo/model.safetensors")
    assert sent(tmp_path, never=[tmp_path / "out"]) == {"config.toml"}


PATTERNS = [
    "*.bin\n",
    "*.bin\n!keep.bin\n",
    "/data\n",
    "data/\n",
    "data/*\n!data/small\n",
    "data/**\n!data/small/\n",
    "**/cache\n",
    "a/**/z\n",
    "# data\n\\#odd\ndata  \n",
    "[ab].txt\n?.md\n",
    "/sub/data/\n*.txt\n!/sub/*.txt\n",
    "sub\n!sub/keep.bin\n",
]


@pytest.mark.skipif(shutil.which("git") is None, reason="git itself is what is compared with")
@pytest.mark.parametrize("patterns", PATTERNS)
@pytest.mark.parametrize("below", ["", "!data\n", "*.md\n!b.txt\n"])
def test_git_ignores_the_same(tmp_path: Path, patterns: str, below: str) -> None:
    make(
        tmp_path, "keep.bin", "big.bin", "data/x", "data/small/y", "data/big.bin", "sub/data/z",
        "sub/keep.bin", "sub/big.bin", "cache/x", "sub/cache/y",
        "a/z", "a/b/c/z", "#odd", "a.txt", "b.txt", "c.txt", "a.md",
        "long.md", "sub/b.txt", "sub/a.md",
    )  # fmt: skip
    (tmp_path / ".gitignore").write_text(patterns)
    (tmp_path / "sub" / ".gitignore").write_text(below)
    bare = {"GIT_CONFIG_GLOBAL": os.devnull, "GIT_CONFIG_SYSTEM": os.devnull, "PATH": os.environ["PATH"]}
    git = ["git", "-C", str(tmp_path)]
    subprocess.run([*git, "init", "-q"], check=True, env=bare, timeout=30)
    listed = subprocess.run(
        [*git, "ls-files", "--others", "--exclude-standard", "-z"],
        check=True, capture_output=True, text=True, env=bare, timeout=30,
    )  # fmt: skip
    assert sent(tmp_path) == set(listed.stdout.split("\0")) - {""}


def test_rayignore_has_the_last_word(tmp_path: Path) -> None:
    make(tmp_path, "notes.md", "weights.bin", "scratch.bin", "agent.py")
    (tmp_path / ".gitignore").write_text("*.bin\n")
    (tmp_path / ".rayignore").write_text("!weights.bin\nnotes.md\n.gitignore\n.rayignore\n")
    assert sent(tmp_path) == {"agent.py", "weights.bin"}


def test_the_repository_above_has_a_word_too(tmp_path: Path) -> None:
    make(tmp_path, ".git/", "jobs/a/config.toml", "jobs/a/.local", "jobs/a/x.bin")
    (tmp_path / ".gitignore").write_text(".local\n")
    (tmp_path / "jobs" / ".gitignore").write_text("a/*.bin\n")
    assert sent(tmp_path / "jobs" / "a") == {"config.toml"}
    (tmp_path / ".gitignore").write_text("jobs/\n")  # this very folder is ignored: it was named all the same
    assert sent(tmp_path / "jobs" / "a") == {".local", "config.toml", "x.bin"}


def test_without_a_repository_nothing_above_has_a_word(tmp_path: Path) -> None:
    make(tmp_path, "a/config.toml")
    (tmp_path / ".gitignore").write_text("*.toml\n")
    assert sent(tmp_path / "a") == {"config.toml"}


def test_links_are_followed_but_not_in_circles(tmp_path: Path) -> None:
    make(tmp_path, "shared/env.py", "project/config.toml")
    make(tmp_path, "project/inside/more.py")
    (tmp_path / "project" / "lib").symlink_to(tmp_path / "shared")
    (tmp_path / "project" / "again").symlink_to("inside")
    (tmp_path / "project" / "up").symlink_to(tmp_path / "project")
    (tmp_path / "project" / "gone").symlink_to(tmp_path / "nowhere")
    (tmp_path / "project" / ".rayignore").write_text("!/lib\n")
    found = sent(tmp_path / "project") - {".rayignore"}
    assert found == {"config.toml", "lib/env.py", "inside/more.py", "again/more.py"}


def test_links_that_lead_out_are_refused_unless_they_are_meant(tmp_path: Path) -> None:
    make(tmp_path, "keys/id_rsa", "project/config.toml", "project/sub/x.py")
    (tmp_path / "project" / "home").symlink_to(tmp_path / "keys")
    (tmp_path / "project" / "sub" / "key").symlink_to(tmp_path / "keys" / "id_rsa")
    with pytest.raises(ConfigError, match="2 links lead out of the folder") as caught:
        collect(tmp_path / "project")
    assert f"- home -> {tmp_path}/keys" in caught.value.problem
    assert f"- sub/key -> {tmp_path}/keys/id_rsa" in caught.value.problem
    (tmp_path / "project" / ".rayignore").write_text("/home\n!/sub/key\n")
    assert sent(tmp_path / "project") == {".rayignore", "config.toml", "sub/key", "sub/x.py"}


def test_too_much_is_refused_and_the_largest_are_named(tmp_path: Path) -> None:
    make(tmp_path, "config.toml")
    for size in range(1, 8):
        (tmp_path / f"file{size}.bin").write_bytes(b"x" * size * 2**20)
    (tmp_path / "hole.bin").touch()
    os.truncate(tmp_path / "hole.bin", 90 * 2**20)
    with pytest.raises(ConfigError) as caught:
        collect(tmp_path)
    problem = caught.value.problem
    assert problem.startswith("118.0 MiB would be sent to the cluster, more than 100 MiB")
    named = [line.split()[1] for line in problem.splitlines()[1:]]
    assert named == ["hole.bin", "file7.bin", "file6.bin", "file5.bin", "file4.bin"]
    assert ".rayignore" in caught.value.mend
    (tmp_path / ".rayignore").write_text("hole.bin\n")
    assert collect(tmp_path).size == 28 * 2**20 + len("x") + len("hole.bin\n")


@pytest.mark.parametrize(
    ("prepare", "words"),
    [
        (lambda root: root / "gone", "no such folder"),
        (lambda root: root, "nothing in this folder"),
        (lambda root: Path("/"), "root of a file system"),
        (lambda root: Path.home(), "home folder"),
    ],
)
def test_what_cannot_be_sent_is_refused(tmp_path: Path, prepare: object, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        collect(prepare(tmp_path))  # type: ignore[operator]


def test_the_archive_holds_just_that_and_is_the_same_every_time(tmp_path: Path) -> None:
    root = tmp_path / "project"
    make(root, "config.toml", "agent/env.py", "run.sh", "notes.log")
    (root / "run.sh").chmod(0o755)
    (root / ".gitignore").write_text("*.log\n")
    write_archive(collect(root), tmp_path / "a.zip")
    os.utime(root / "config.toml", (1, 1))
    write_archive(collect(root), tmp_path / "b.zip")
    assert (tmp_path / "a.zip").read_bytes() == (tmp_path / "b.zip").read_bytes()
    with zipfile.ZipFile(tmp_path / "a.zip") as archive:
        assert archive.namelist() == [".gitignore", "agent/env.py", "config.toml", "run.sh"]
        assert archive.read("config.toml") == b"x"
        assert archive.getinfo("run.sh").external_attr >> 16 == 0o755
    (root / "config.toml").write_text("y")
    write_archive(collect(root), tmp_path / "c.zip")
    assert (tmp_path / "a.zip").read_bytes() != (tmp_path / "c.zip").read_bytes()


@pytest.mark.parametrize("name", ["../out.py", "sub/../../out.py", "{absolute}/out.py"])
def test_ray_unpacks_nothing_beside_the_folder_of_a_job(tmp_path: Path, name: str) -> None:
    """Whoever has the token may send an archive that was not made by us."""
    from ray._private.runtime_env.packaging import unzip_package

    name = name.format(absolute=tmp_path)
    with zipfile.ZipFile(tmp_path / "evil.zip", "w") as archive:
        archive.writestr("config.toml", "x")
        archive.writestr(name, "x")
    target = tmp_path / "target"
    unzip_package(str(tmp_path / "evil.zip"), str(target), False, False)
    assert (target / "config.toml").exists()
    assert sorted(path.name for path in tmp_path.iterdir() if path != target) == ["evil.zip"]
