"""The command line: every command as a user and as a program calls it, every mistake one message and exit code."""

import importlib.util
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from itertools import count
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from commands import SPEC, call, real
from typer.main import get_command

from llsa_gen import Spec, __version__, aot, compiler, fuzz, load
from llsa_gen.cli import app
from llsa_gen.cli import explain as explanation
from llsa_gen.errors import CheckFailed, SharedMemoryError
from llsa_gen.fuzz import search
from llsa_gen.fuzz.case import Case
from llsa_gen.plan import lower
from llsa_gen.plan.cost import BYTES, Cost, dense, evaluate
from llsa_gen.schedule import schedule, target
from llsa_gen.spec import schema_text
from llsa_gen.store import Store, tuned

ROOT = Path(__file__).resolve().parents[2]

WRONG = """\
name: tiny
head_dim: eight
levels:
  - {block: 4, topk: 0}
  - {blok: 2, topk: 1}
"""


COMMANDS = (
    "new", "build", "bench", "check", "tune", "explain", "look", "export", "cache", "cache ls", "cache clear",
    "cache why",
)  # fmt: skip


# ---- help -------------------------------------------------------------------------------------------------------


def test_all_commands_are_there_and_only_they() -> None:
    group: Any = get_command(app)
    inner = {f"cache {name}" for name in group.commands["cache"].commands}
    assert set(group.commands) | inner == set(COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
def test_help_has_an_example_that_parses(command: str, place: Path) -> None:
    result = call(f"{command} --help")
    assert result.code == 0
    example = re.search(r"Example: llsa-gen (.*(\n .*\S)*)", result.out)
    assert example, result.out
    words = shlex.split(example[1])
    parsed: Any = get_command(app)
    while words and words[0] in getattr(parsed, "commands", {}):
        parsed = parsed.commands[words.pop(0)]
    parsed.make_context("llsa-gen", words)  # raises UsageError


@pytest.mark.parametrize("command", ["new", "build", "explain", "cache ls", "cache why"])
def test_the_example_runs(command: str, place: Path) -> None:
    shutil.copytree(ROOT / "spec", place / "spec", dirs_exist_ok=True)
    example = re.search(r"Example: llsa-gen (.*(\n .*\S)*)", call(f"{command} --help").out)
    assert example
    result = call(example[1])
    assert (result.code, result.err) == (0, "")
    assert result.out


def test_the_help_of_all_has_a_way_to_start(place: Path) -> None:
    start = re.search(r"Start with: (.*)", call("--help").out)
    assert start
    for step in start[1].split(";"):
        assert call(step.strip().removeprefix("llsa-gen ")).code == 0


def test_version() -> None:
    assert call("--version").out == f"llsa-gen {__version__}\n"


def test_help_and_explain_do_not_wait_for_torch() -> None:
    program = (
        "import sys; from llsa_gen.cli import main; sys.argv = ['llsa-gen', *{0}]\ntry: main()\nexcept SystemExit: pass"
    )
    program += "\nprint(sorted({{'torch', 'triton', 'sympy', 'jinja2'}} & sys.modules.keys()))"
    for words, loaded in ((["--help"], "[]"), (["explain", str(ROOT / "spec/llsa_l1.yaml"), "-n", "5"], "['sympy']")):
        result = subprocess.run(
            [sys.executable, "-c", program.format(words)], capture_output=True, text=True, timeout=600
        )
        assert result.stdout.splitlines()[-1] == loaded, result.stderr


# ---- new --------------------------------------------------------------------------------------------------------


def test_new_writes_a_spec_that_loads_and_its_schema(place: Path) -> None:
    result = call("new mine")
    assert (result.code, result.err) == (0, "")
    assert load("mine.yaml").name == "mine"
    assert (place / "schema.json").read_text() == schema_text()
    assert "llsa-gen explain mine.yaml -n 65536" in result.out
    assert call("explain mine -n 65536").code == 0


def test_new_replaces_nothing_unless_told(place: Path) -> None:
    (place / "mine.yaml").write_text("precious")
    (place / "schema.json").write_text("{}")
    result = call("new mine")
    assert (result.code, result.out, result.err) == (1, "", "mine.yaml: exists already; --force replaces it\n")
    assert (place / "mine.yaml").read_text() == "precious"
    assert call("new mine --force").code == 0
    assert load("mine.yaml").name == "mine"
    assert (place / "schema.json").read_text() == "{}"


@pytest.mark.parametrize("name", ["3x", "class", "../mine", "a-b", "''", "ünï", "x" * 65])
def test_new_refuses_what_is_no_name(name: str, place: Path) -> None:
    before = sorted(place.rglob("*"))
    result = call(f"new {name}")
    assert (result.code, result.out) == (1, "")
    assert result.err.startswith("NAME: expected a") and result.err.count("\n") == 1
    assert sorted(place.rglob("*")) == before


# ---- which spec -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("said", ["tiny", "spec/tiny.yaml", "./spec/tiny.yaml", "{place}/spec/tiny.yaml"])
def test_a_spec_is_a_path_or_a_name_in_spec(said: str, place: Path) -> None:
    assert call(f"explain {said.format(place=place)} -n 10 --json").json["spec"] == "tiny"


def test_a_file_here_comes_first(place: Path) -> None:
    (place / "tiny.yaml").write_text(SPEC.replace("head_dim: 8", "head_dim: 16"))
    assert call("explain tiny.yaml -n 10 --json").json["head_dim"] == 16
    assert call("explain tiny -n 10 --json").json["head_dim"] == 8, "a bare name is one in ./spec, if it is there"
    (place / "other.yaml").write_text(SPEC.replace("tiny", "other"))
    assert call("explain other -n 10 --json").json["spec"] == "other"


@pytest.mark.parametrize(
    "command", ["build {}", "bench {}", "check {}", "explain {} -n 10", "export {}", "cache why {}"]
)
def test_a_missing_spec_is_one_message(command: str, place: Path) -> None:
    for said, message in {
        "tinny": "spec/tinny.yaml: expected a spec file, got no such file; did you mean spec/tiny.yaml?\n",
        "gone/x.yaml": "gone/x.yaml: expected a spec file, got no such file\n",
        "spec": "spec/spec.yaml: expected a spec file, got no such file\n",
        "./spec": "./spec: expected a spec file, got a directory\n",
    }.items():
        result = call(command.format(said))
        assert (result.code, result.out) == (1, "")
        assert result.err.replace("\n", " ").split() == message.split(), said


def test_a_link_to_nothing_is_told_by_whatever_name(place: Path) -> None:
    (place / "spec" / "loose.yaml").symlink_to("gone.yaml")
    (place / "here.yaml").symlink_to("gone.yaml")
    (place / "bare").symlink_to("gone")
    for said, told in {
        "loose": "spec/loose.yaml",
        "here": "here.yaml",
        "here.yaml": "here.yaml",
        "bare": "bare",
    }.items():
        result = call(f"explain {said} -n 10")
        assert (result.code, result.out) == (1, "")
        gone = "gone" if said == "bare" else "gone.yaml"
        assert result.err == f"{told}: expected a spec file, got a link to {gone}, where nothing is\n"


@pytest.mark.parametrize(
    "command", ["build {}", "bench {}", "check {}", "explain {} -n 10", "export {}", "cache why {}"]
)
def test_a_wrong_spec_is_told_with_all_its_mistakes(command: str, place: Path) -> None:
    (place / "spec" / "wrong.yaml").write_text(WRONG)
    result = call(command.format("wrong"))
    assert (result.code, result.out) == (1, "")
    lines = result.err.splitlines()
    assert lines[0] == "spec/wrong.yaml:2:11: head_dim: expected an integer >= 8 and <= 256, got 'eight'"
    assert lines[1].startswith("spec/wrong.yaml:4:22: levels[0].topk: expected an integer >= 1")
    assert any("did you mean block?" in line for line in lines)


# ---- explain ----------------------------------------------------------------------------------------------------


def test_explain_as_json_is_the_cost_model(place: Path) -> None:
    data = call("explain tiny -n 1000 --heads 3 --dtype float32 --json").json
    plan = lower(load("spec/tiny.yaml"))
    cost = Cost(plan, schedule(plan, target("cuda:90"), 4), "float32")
    assert data["cost"]["forward_flops"] == evaluate(cost.totals.forward.flops, 1000, 3)
    assert data["cost"]["backward_bytes_moved"] == evaluate(cost.totals.backward.moved, 1000, 3)
    assert data["cost"]["saved_bytes"] == evaluate(cost.totals.saved, 1000, 3)
    assert data["dense"]["backward_flops"] == 10 * 1000**2 * 8 * 3
    assert data["keys"] == {"most": evaluate(cost.keys, 1000), "exact": True}
    assert [level["keys"] for level in data["levels"]] == [125, 2, 8]
    assert sum(level["flops"] for level in data["levels"]) == evaluate(cost.totals.flops, 1000, 3)
    assert data["dense_over_cost"]["forward_flops"] == pytest.approx(
        data["dense"]["forward_flops"] / data["cost"]["forward_flops"]
    )
    assert data["growth"]["text"] == "N^2/8 from level 2 (linear below)"
    assert "add a level" in data["warning"]
    assert "plan" not in data


def test_explain_counts_queries_where_they_are_not_as_many_as_keys(place: Path) -> None:
    data = call("explain tiny -n 1000 -m 77 --heads 3 --dtype float32 --json").json
    plan = lower(load("spec/tiny.yaml"))
    cost = Cost(plan, schedule(plan, target("cuda:90"), 4), "float32")
    assert (data["n_tokens"], data["m_tokens"]) == (1000, 77)
    assert data["cost"]["forward_flops"] == evaluate(cost.totals.forward.flops, 1000, 3, 77)
    assert data["cost"]["backward_bytes_moved"] == evaluate(cost.totals.backward.moved, 1000, 3, 77)
    assert data["cost"]["saved_bytes"] == evaluate(cost.totals.saved, 1000, 3, 77)
    assert data["dense"]["backward_flops"] == 10 * 1000 * 77 * 8 * 3
    assert data["dense"]["forward_bytes_moved"] == 3 * 4 * (2 * 77 * 8 + 2 * 1000 * 8 + 77)
    assert data["dense"]["saved_bytes"] == 3 * 4 * 77
    assert sum(level["flops"] for level in data["levels"]) == evaluate(cost.totals.flops, 1000, 3, 77)
    same = call("explain tiny -n 1000 --heads 3 --dtype float32 --json").json
    assert data["keys"] == same["keys"] and data["growth"] == same["growth"]
    for flags in ("", "--plan"):
        text = call(f"explain tiny -n 1000 --heads 3 --dtype float32 {flags}").out
        assert call(f"explain tiny -n 1000 -m 1000 --heads 3 --dtype float32 {flags}").out == text
        assert call(f"explain tiny -n 1000 -m 77 --heads 3 --dtype float32 {flags}").out != text


@pytest.mark.parametrize(
    ("lengths", "said"),
    [("-n 1000 -m 77", "tiny at 1,000 keys and 77 queries, 8 heads"), ("-n 1 -m 1", "tiny at 1 token, 8 heads"),
     ("-n 1 --queries 5000", "tiny at 1 key and 5,000 queries, 8 heads"),
     ("-n 2 -m 1", "tiny at 2 keys and 1 query, 8 heads")],
)  # fmt: skip
def test_explain_says_which_lengths_it_is_for(lengths: str, said: str, place: Path) -> None:
    assert said in call(f"explain tiny {lengths}").out


@pytest.mark.parametrize("head_dim", [8, 72])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_dense_attention_of_as_many_queries_is_that_of_the_cost_model(head_dim: int, dtype: str) -> None:
    here, there = explanation.dense(head_dim, BYTES[dtype]), dense(head_dim, BYTES[dtype])
    for x, y in ((here.forward, there.forward), (here.backward, there.backward)):
        for one in ("flops", "moved", "scratch"):
            assert evaluate(getattr(x, one), 777, 3) == evaluate(getattr(y, one), 777, 3)
    assert evaluate(here.saved, 777, 3) == evaluate(there.saved, 777, 3)


def test_explain_prints_what_the_json_says(place: Path) -> None:
    shutil.copy(ROOT / "spec" / "llsa_l2.yaml", place / "spec")
    result = call("explain llsa_l2 -n 65536")
    assert (result.code, result.err) == (0, "")
    for said in (
        "llsa_l2 at 65,536 tokens, 8 heads of 64 (batch included), bfloat16",
        "69.4 GFLOP", "8.8 TFLOP", "127x", "13.7 MiB", "512",
        "N^2/256 from level 2 (linear below)", "beyond 65,811 tokens", "N log N",
    ):  # fmt: skip
        assert said in result.out
    assert "warning" not in result.out
    assert not any(line.rstrip().endswith("…") for line in result.out.splitlines()), "nothing is cut off"


@pytest.mark.parametrize(
    ("name", "n", "warned"),
    [("llsa_l1", 2000, False), ("llsa_l1", 4096, True), ("llsa_l2", 65_536, False), ("llsa_l2", 262_144, True),
     ("llsa_l3", 262_144, False), ("topk_l1", 65_536, False), ("uneven", 20_000, True)],
)  # fmt: skip
def test_explain_warns_where_there_are_too_few_levels(name: str, n: int, warned: bool) -> None:
    spec = ROOT / "spec" / f"{name}.yaml"
    data, text = call(f"explain {spec} -n {n} --json").json, call(f"explain {spec} -n {n}").out
    assert (data["warning"] is not None) == warned == ("warning: level" in text)
    if warned:
        advised = re.search(r"add a level: another .* takes (\S+) times fewer", data["warning"])
        assert advised and float(advised[1]) > 1.2


def test_a_query_that_sees_fewer_keys_is_not_passed_over(place: Path) -> None:
    assert "at most" in call("explain tiny -n 1001").out
    assert "at most" not in call("explain tiny -n 1000").out
    assert not call("explain tiny -n 1001 --json").json["keys"]["exact"]


def test_explain_prints_the_plan(place: Path) -> None:
    result = call("explain tiny -n 1000 --plan")
    data = call("explain tiny -n 1000 --plan --json").json["plan"]
    for kernel in data["forward"] + data["backward"]:
        assert f"{kernel['name']}: {kernel['computes']}" in result.out
        assert kernel["programs"] in result.out
    for name, buffer in data["buffers"].items():
        assert re.search(rf"^ ?{name} +{re.escape('[' + ', '.join(buffer['shape']) + ']')} ", result.out, re.MULTILINE)


def test_a_length_that_the_operator_refuses_is_one_message(place: Path) -> None:
    (place / "spec" / "tiny.yaml").write_text(SPEC.replace("topk: 2", "topk: 512"))
    most = lower(load("spec/tiny.yaml")).max_tokens
    assert call(f"explain tiny -n {most}").code == 0
    for command in ("explain", "build"):
        result = call(f"{command} tiny -n {most + 1}")
        assert (result.code, result.err.count("\n")) == (1, 1)
        assert result.err.startswith(f"n: expected 1 to {most} tokens, the most that tiny takes, got {most + 1}")
    assert call(f"explain tiny -n 5 -m {most}").code == 0
    for command in ("explain tiny -n 5", "explain tiny -n 5 --plan", "bench tiny --device cpu -n 5"):
        result = call(f"{command} -m {most + 1}")
        assert (result.code, result.err.count("\n")) == (1, 1)
        assert result.err.startswith(f"m: expected 1 to {most} queries, the most that tiny takes, got {most + 1}")


# ---- build and export -------------------------------------------------------------------------------------------


def test_build_says_where_the_module_is_and_what_it_costs(place: Path) -> None:
    result = call("build tiny -n 1000 --heads 2")
    assert (result.code, result.err.count("\n")) == (0, 1)
    assert result.err.startswith("warning: level 2 grows quadratically")
    (stored,) = (place / "cache").glob("*/tiny.py")
    assert f"module  {stored}" in result.out
    assert "135 keys a query, of 1,000" in result.out
    data = call("build tiny -n 1000 --heads 2 --json").json
    assert (data["path"], data["digest"]) == (str(stored), load("spec/tiny.yaml").digest)
    assert data["cost"] == call("explain tiny -n 1000 --heads 2 --json").json


def test_build_works_without_a_cache(place: Path) -> None:
    (place / "cache").write_text("a file where a directory should be")
    result = call("build tiny -n 8")
    assert result.code == 0
    assert "module  in memory only" in result.out
    assert result.err.startswith("warning: llsa_gen cannot write to its cache")
    assert "cli.py" not in result.err


def test_a_setting_that_means_nothing_is_one_message(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = Path("spec/tiny.yaml").read_text()
    Path("spec/other.yaml").write_text(text.replace("name: tiny", "name: launched_fast"))  # which no test has imported
    monkeypatch.setenv("LLSA_GEN_LAUNCH", "fast")
    result = call("build other -n 8")
    assert (result.code, result.out, result.err) == (
        1, "", "LLSA_GEN_LAUNCH: expected auto or triton, got 'fast'\n"
    )  # fmt: skip
    monkeypatch.setenv("LLSA_GEN_LAUNCH", "triton")
    assert call("build other -n 8").code == 0


def test_export_writes_the_module_that_runs(place: Path) -> None:
    result = call("export tiny -o out/deep")
    assert (result.code, result.out, result.err) == (0, "out/deep/tiny.py\n", "")
    attention = compiler.compile("spec/tiny.yaml")
    assert (place / "out/deep/tiny.py").read_text() == attention.source
    assert call("export tiny -o out/deep --json").json == {
        "spec": "tiny",
        "module": "out/deep/tiny.py",
        "manifests": {},
    }
    found = importlib.util.spec_from_file_location("exported_tiny", place / "out/deep/tiny.py")
    assert found is not None and found.loader is not None
    module = importlib.util.module_from_spec(found)
    found.loader.exec_module(module)
    assert module.OPERATOR == attention.module.OPERATOR


def test_the_header_says_how_to_make_it_again(place: Path) -> None:
    call("export tiny")
    first = (place / "tiny.py").read_text()
    command = re.search(r"`llsa-gen (export \S+)` makes it again", first)
    assert command
    (place / "tiny.py").unlink()
    shutil.copy("spec/tiny.yaml", "tiny.yaml")
    assert call(command[1]).code == 0
    assert (place / "tiny.py").read_text() == first


def test_export_replaces_its_own_modules_and_nobody_elses(place: Path) -> None:
    (place / "tiny.py").write_text("precious = 1\n")
    result = call("export tiny")
    assert (result.code, result.out) == (1, "")
    assert result.err == "tiny.py: exists already and is no module that llsa-gen made; --force replaces it\n"
    assert (place / "tiny.py").read_text() == "precious = 1\n"
    assert call("export tiny --force").code == 0
    assert call("export tiny").code == 0


def test_export_to_where_nothing_can_be_written(place: Path) -> None:
    (place / "file").write_text("")
    result = call("export tiny -o file/below")
    assert (result.code, result.out, result.err) == (1, "", "file/below: Not a directory\n")
    assert call("export tiny -o file").code == 2
    result = call("export tiny -o /proc/nothing")
    assert (result.code, result.err.count("\n")) == (1, 1)
    assert result.err.startswith("/proc/nothing: ")


@pytest.mark.parametrize(
    ("options", "occupied", "message"),
    [
        ("-o out", "out/tiny.py/", "out/tiny.py: Is a directory"),
        ("-o out/deep", "out", "out/deep: Not a directory"),
        ("-o /proc/nothing/deep", "", "/proc/nothing/deep: No such file or directory"),
        ("-o out --target cuda:90", "out/tiny-cuda-90-bfloat16", "out/tiny-cuda-90-bfloat16: Not a directory"),
        ("-o out --target cuda:90", "out/tiny-cuda-90-bfloat16/manifest.json/",
         "out/tiny-cuda-90-bfloat16/manifest.json: Is a directory"),
        (f"--target {'x' * 10**5}", "", "target: expected one of "),
    ],
)  # fmt: skip
def test_export_finds_out_where_it_can_not_write_before_it_compiles(
    options: str, occupied: str, message: str, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compiler, "compile", lambda *_: pytest.fail("nothing is compiled"))
    if occupied.endswith("/"):
        (place / occupied).mkdir(parents=True)
    elif occupied:
        (place / occupied).parent.mkdir(exist_ok=True)
        (place / occupied).write_text("precious")
    before = sorted(place.rglob("*"))
    result = call(f"export tiny {options}")
    assert (result.code, result.out, result.err.count("\n")) == (1, "", 1)
    assert result.err.startswith(message) and len(result.err) < 500
    assert sorted(place.rglob("*")) == before


def test_a_full_disk_is_one_message_and_what_was_there_stays(place: Path) -> None:
    (place / "out").mkdir()
    for command, path in (("new mine --force", place / "mine.yaml"), ("export tiny -o out", place / "out" / "tiny.py")):
        path.write_text("# Made by llsa_gen\n")
        limited = f"ulimit -f 1; {shlex.quote(sys.executable)} -m llsa_gen {command}"
        done = subprocess.run(
            ["bash", "-c", limited], capture_output=True, text=True, env={**os.environ, "LLSA_GEN_CACHE_DIR": "cache"}
        )
        assert done.returncode == 1
        assert done.stderr.splitlines()[-1] == f"{path.relative_to(place)}: File too large"
        assert path.read_text() == "# Made by llsa_gen\n"
        assert not list(path.parent.glob(".*"))


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("explain tiny -n 0", "expected an integer >= 1 and <= 1073741824, got 0"),
        ("explain tiny -n 5 --heads -2", "expected an integer >= 1, got -2"),
        ("explain tiny -n 5 -m 0", "expected an integer >= 1 and <= 1073741824, got 0"),
        ("bench tiny -n 5 -m 0", "expected an integer >= 1, got 0"),
        ("check tiny --seed -1", "expected an integer >= 0, got -1"),
        ("check tiny --examples 0", "expected an integer >= 1, got 0"),
    ],
)
def test_an_integer_out_of_range(command: str, message: str, place: Path) -> None:
    result = call(command)
    assert result.code == 2
    assert message in " ".join(result.err.replace("\u2502", " ").split())


def test_export_finds_out_about_a_target_first(place: Path) -> None:
    result = call("export tiny -o out --target cuda:90 --target cuda:9000")
    assert (result.code, result.out) == (1, "")
    assert "cuda:9000" in result.err and "cuda:90," in result.err and result.err.count("\n") == 1
    assert not (place / "out").exists()


def test_export_writes_nothing_where_a_kernel_does_not_fit(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def prepare(attention: compiler.Attention, target: str, dtype: str) -> aot.Export:
        if target == "cuda:90":
            return aot.Export(attention.module, target, dtype, [])
        raise SharedMemoryError("tiny", target, dtype, {"select_l2_kernel": 131072, "attend_kernel": 102400}, 101376)

    monkeypatch.setattr(aot, "prepare", prepare)
    result = call("export tiny -o out --target cuda:90 --target cuda:86")
    assert (result.code, result.out) == (1, "")
    assert result.err.splitlines()[-1] == (
        "tiny: select_l2_kernel takes 131,072, attend_kernel takes 102,400 bytes of shared memory, "
        "and cuda:86 has 101,376 (bfloat16); nothing was written"
    )
    assert not (place / "out").exists()
    assert call("export tiny -o out --target cuda:90").code == 0
    assert {path.name for path in (place / "out").iterdir()} == {"tiny.py", "tiny-cuda-90-bfloat16"}


@pytest.mark.slow
def test_export_for_a_target_writes_binaries_and_a_manifest(place: Path) -> None:
    result = call("export tiny -o out --target cuda:90 --dtype float16 --json")
    assert result.code == 0
    path = Path(result.json["manifests"]["cuda:90"])
    manifest = json.loads(path.read_text())
    assert (manifest["target"], manifest["dtype"]) == ("cuda:90", "float16")
    assert len(list(path.parent.glob("*.cubin"))) == len(manifest["kernels"])
    assert "compiling for cuda:90, float16" in result.err


# ---- check ------------------------------------------------------------------------------------------------------


def test_check_agrees_and_says_what_it_did(place: Path) -> None:
    result = call("check tiny --examples 3 --seed 7")
    assert result.code == 0
    assert "tiny on cpu: 3 cases agree with the reference" in result.out
    assert "seed 7" in result.out
    one, two = (call("check tiny --examples 3 --seed 7 --json").json for _ in range(2))
    assert one["ok"] and one["examples"] == 3
    assert one["margins"] == two["margins"]


def test_check_without_a_spec_draws_them(place: Path) -> None:
    data = call("check --examples 2 --json").json
    assert (data["ok"], data["examples"], data["specs"]) == (True, 2, 2)


def test_check_stops_in_time(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ticks = count(step=0.25)  # the clock goes on whenever somebody looks at it
    monkeypatch.setattr(search, "time", SimpleNamespace(monotonic=lambda: next(ticks)))
    found = call("check tiny --seconds 2 --json").json
    assert 2 <= found["examples"] <= 8 and 2.0 <= found["seconds"] <= 3.0


def test_a_failing_check_prints_a_script_and_exits_with_1(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case(load("spec/tiny.yaml"), n=5)
    script = fuzz.reproducer(case)

    def fails(*_: object, **__: object) -> None:
        raise CheckFailed("o: error 1, allowed 0", script)

    monkeypatch.setattr(fuzz, "check", fails)
    result = call("check tiny")
    assert (result.code, result.out) == (1, script + "\n")
    assert "o: error 1, allowed 0\n" in result.err
    result = call("check tiny --json")
    assert result.code == 1
    assert result.json == {"ok": False, "message": "o: error 1, allowed 0", "reproducer": script}
    compile(script, "pasted", "exec")


@pytest.mark.parametrize("device", ["cuda:99", "meta", "nonsense", "cuda:x", "''"])
def test_a_device_that_is_not_there_is_one_message(device: str, place: Path) -> None:
    result = call(f"check tiny --device {device}")
    assert (result.code, result.out) == (1, "")
    assert result.err.startswith("--device: expected cpu or a GPU such as cuda, got ")
    assert result.err.count("\n") == 1


def test_interpreting_is_refused_where_it_is_too_late_or_senseless(place: Path) -> None:
    import triton

    assert triton
    result = call("check tiny --interpret")
    assert (result.code, result.out) == (1, "")
    assert "triton is imported already" in result.err
    assert "TRITON_INTERPRET" not in os.environ
    assert call("check tiny --interpret --device cuda").code == 2


@pytest.mark.slow
def test_check_interprets_the_kernels_in_a_process_of_its_own(place: Path) -> None:
    result = real("check tiny --interpret --examples 1 --seed 3 --json")
    assert result.code == 0, result.err
    assert result.json["interpreted"] and result.json["examples"] == 1


# ---- cache ------------------------------------------------------------------------------------------------------


def test_the_cache_from_empty_to_cleared(place: Path) -> None:
    assert call("cache ls").out == f"{place / 'cache'}: 0 modules\n"
    assert call("cache why tiny --json").json["outcome"] == "unknown name"
    assert call("build tiny").code == 0
    result = call("cache ls")
    assert f"{place / 'cache'}: 1 module\n" in result.out
    entry = Store().entries()[0]
    assert re.search(rf"tiny +{entry.digest[:12]} +\d+-\d+-\d+ \d+:\d+:\d+ +\S+ KiB", result.out)
    data = call("cache ls --json").json
    assert [row["name"] for row in data["entries"]] == ["tiny"]
    assert data["entries"][0]["path"] == str(entry.path) and data["entries"][0]["intact"]
    assert call("cache why tiny --json").json["outcome"] == "hit"
    assert "hit" in call("cache why tiny").out
    (place / "spec" / "tiny.yaml").write_text(SPEC.replace("topk: 2", "topk: 3"))
    data = call("cache why tiny --json").json
    assert (data["outcome"], [row["part"] for row in data["differences"]]) == ("differs", ["spec", "schedule"])
    assert re.search(r"spec +changed", call("cache why tiny").out)
    assert call("cache clear --yes").out == f"removed 1 module from {place / 'cache'}\n"
    assert call("cache ls --json").json["entries"] == []


def test_tuned_schedules_are_listed_and_stay_unless_asked(place: Path) -> None:
    row = {"stage": "attend", "when": {"element": 2}, "set": {"num_warps": 8}, "why": "a test"}
    file = place / "cache" / "schedules" / "cuda_90.json"
    assert call("build tiny").code == 0 and call("cache ls --json").json["tuned"] == []
    assert tuned.add(Store(), "cuda:90", [row]) == file
    data = call("cache why tiny --json").json
    assert (data["outcome"], [row["part"] for row in data["differences"]]) == ("differs", ["schedule"])
    assert f"tuned schedules: {file}\n" in call("cache ls").out
    assert call("cache ls --json").json["tuned"] == [str(file)]
    explain = "explain tiny -n 1000 --plan"
    assert "a test" in call(explain).out and "a test" not in call(explain + " --target cuda:80").out
    here, elsewhere = (
        call(explain + goal + " --json").json["schedule"]["stages"]["attend"]["entry"]["num_warps"]
        for goal in ("", " --target cuda:80")
    )
    assert here == 8 != elsewhere
    assert "tuned schedules stay" in call("cache clear --yes").out and file.exists()
    refused = call("cache clear --tuned", answer="n\n")
    assert refused.code == 1 and "Remove 0 modules and the tuned schedules" in refused.out + refused.err
    assert "removed the tuned schedules of 1 target" in call("cache clear --tuned --yes").out and not file.exists()


def test_a_broken_file_of_tuned_schedules_is_one_warning(place: Path) -> None:
    file = place / "cache" / "schedules" / "cuda_90.json"
    file.parent.mkdir(parents=True)
    file.write_text("broken")
    tuned._told.clear()
    result = call("build tiny")
    assert result.code == 0
    assert (
        result.err.startswith(f"warning: tuned schedules are ignored: {file}: ")
        and result.err.count("tuned schedules") == 1
    )


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_tune_without_a_gpu_is_one_clear_error(place: Path) -> None:
    result = call("tune tiny --stage attend --seconds 5")
    assert (result.code, result.out) == (1, "")
    assert result.err == "tune: expected a CUDA or ROCm GPU to measure on, and torch finds none\n"
    assert call("tune gone").code == 1 and call("tune tiny --seconds 0").code == call("tune").code == 2


def test_what_tune_prints(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from llsa_gen import tune
    from llsa_gen.tune.search import StageResult, Trial

    def fake(spec: Spec, **asked: object) -> tune.Report:
        assert (asked["n_tokens"], asked["stages"], asked["seconds"]) == (4096, ["attend", "scan"], 5)
        before, after = {"BLOCK_N": 32, "num_warps": 2}, {"BLOCK_N": 64, "num_warps": 2}
        trials = [Trial(after, 50.0), Trial(before, reason="wrong: o")]
        results = (StageResult("attend", before, 100.0, after, 50.0, trials), StageResult("scan", {}, 9.0, {}, 9.0))
        rows = ({"stage": "attend", "set": after},)
        return tune.Report(spec.name, "cuda:90", "A GPU", 4096, "bfloat16", results, rows, Path("cuda_90.json"))

    monkeypatch.setattr(tune, "tune", fake)
    words = "tune tiny -n 4096 --stage attend --stage scan --seconds 5"
    text = call(words).out
    assert "tiny at 4,096 tokens, bfloat16, on A GPU (cuda:90)" in text
    assert re.search(r"attend +100.0 +50.0 +1 +1 +BLOCK_N 64", text) and re.search(
        r"scan +9.0 +- +0 +0 +as it was", text
    )
    assert text.endswith('{"stage": "attend", "set": {"BLOCK_N": 64, "num_warps": 2}}\n')
    data = call(words + " --json").json
    assert data["stages"][0]["trials"][1]["reason"] == "wrong: o" and data["path"] == "cuda_90.json"


def test_clear_asks_first_and_clears_only_what_is_named(place: Path) -> None:
    (place / "spec" / "other.yaml").write_text(SPEC.replace("tiny", "other"))
    assert call("build tiny").code == call("build other").code == 0
    refused = call("cache clear", answer="n\n")
    assert refused.code == 1 and f"Remove 2 modules from {place / 'cache'}?" in refused.out + refused.err
    assert call("cache clear", answer="").code == 1, "no answer is no"
    assert len(Store().entries()) == 2
    assert call("cache clear other", answer="y\n").code == 0
    assert [entry.name for entry in Store().entries()] == ["tiny"]
    result = call("cache clear other --yes")
    assert (result.code, result.out) == (1, "")
    assert result.err == f"other: {place / 'cache'} holds no module of this name\n"
    assert call("cache clear tiny --yes").code == call("cache clear --yes").code == 0


def test_a_broken_entry_is_listed_as_such(place: Path) -> None:
    call("build tiny")
    (stored,) = (place / "cache").glob("*/tiny.py")
    stored.write_text("broken")
    assert "broken, will be made again" in call("cache ls").out
    assert call("cache why tiny --json").json["outcome"] == "broken"


@pytest.mark.skipif(not hasattr(os, "geteuid"), reason="no owners here")
def test_what_is_refused_is_said_and_left_alone(place: Path) -> None:
    call("build tiny")
    (stored,) = (place / "cache").glob("*/tiny.py")
    stored.chmod(0o666)
    reason = f"{stored} may be written by others than its owner (-rw-rw-rw-)"
    assert call("cache ls").out.endswith(f"refused, for somebody else may have written it: {reason}\n")
    assert call("cache ls --json").json["entries"][0]["refused"] == reason
    assert call("cache ls --json").json["refused"] is None
    assert call("cache why tiny --json").json["outcome"] == "refused" and reason in call("cache why tiny").out

    (place / "cache").chmod(0o777)
    reason = f"{place / 'cache'} may be written by others than its owner (drwxrwxrwx)"
    listed = call("cache ls")
    assert listed.code == 0 and reason in listed.out and "tiny" in listed.out
    assert call("cache ls --json").json["refused"] == reason
    assert call("cache why tiny --json").json["outcome"] == "refused" and reason in call("cache why tiny").out
    for command in ("cache clear", "cache clear --yes --tuned", "cache clear tiny --yes"):
        result = call(command)
        assert (result.code, result.out) == (1, "")
        assert result.err.startswith(f"the cache is refused: {reason}; ") and result.err.count("\n") == 1
    assert stored.exists()
    (place / "cache").chmod(0o755)
    assert call("cache clear --yes").out == f"removed 1 module from {place / 'cache'}\n"


def test_a_cache_that_cannot_be_listed_is_one_message(place: Path) -> None:
    (place / "cache").write_text("a file")
    for command in ("cache ls", "cache clear --yes", "cache why tiny"):
        result = call(command)
        assert (result.code, result.out) == (1, "")
        assert result.err.startswith("the cache directory cannot be listed: ") and result.err.count("\n") == 1


# ---- exit codes -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "command",
    [
        "", "bogus", "explain", "explain tiny", "explain tiny -n", "explain tiny -n 0", "explain tiny -n -5",
        "explain tiny -n many", "explain tiny -n 1.5", f"explain tiny -n {2**30 + 1}", "explain tiny -n 5 --heads 0",
        "explain tiny -m 5", "explain tiny -n 5 -m", "explain tiny -n 5 -m many", "bench tiny -m -1",
        "explain tiny -n 5 --dtype float64", "explain tiny -n 5 --bogus", "explain tiny tiny -n 5", "new", "build",
        "check tiny --examples 0", "check tiny --seconds 0", "check tiny --seed -1", "export", "export tiny -o",
        "cache", "cache bogus", "cache why", "look", "look tiny --image a.png --size 0",
        "look tiny --image a.png --query",
    ],
)  # fmt: skip
def test_wrong_usage_exits_with_2(command: str, place: Path) -> None:
    result = call(command)
    assert result.code == 2
    assert re.search("Usage: llsa-gen|requires an argument", result.out + result.err)
    assert "Traceback" not in result.err


@pytest.mark.parametrize(
    "words",
    [
        ["{}"], ["explain", "{}"], ["explain", "tiny", "-n", "{}"], ["explain", "tiny", "-n", "5", "--{}"],
        ["explain", "tiny", "-n", "5", "--dtype", "{}"], ["explain", "tiny", "-n", "-{}"], ["new", "{}"],
        ["explain", "tiny", "-n", "5", "--target", "{}", "--plan"], ["check", "tiny", "--device", "{}"],
        ["cache", "clear", "{}"], ["look", "tiny", "--image", "{}"], ["look", "tiny", "--image", "a", "--query", "{}"],
        ["look", "tiny", "--image", "a", "-o", "{}"], ["explain", *["{}"] * 100],
    ],
)  # fmt: skip
@pytest.mark.parametrize("typed", ["9" * 4000, "9" * 5000, "x" * 10**5])
def test_no_argument_makes_a_long_message(words: list[str], typed: str, place: Path) -> None:
    result = call([word.format(typed) for word in words])
    assert result.code in (1, 2)
    assert 0 < len(result.err) < (5000 if len(words) == 2 else 1500), "a path may have 4096 characters"


def test_an_interrupted_check_says_how_far_it_came(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object, progress: Any, **__: object) -> None:
        progress(7, 1.0)
        raise KeyboardInterrupt

    monkeypatch.setattr(fuzz, "check", interrupted)
    result = call("check tiny")
    assert (result.code, result.out) == (130, "")
    assert result.err == "warning: interrupted: 7 cases agreed with the reference until then\n"


def test_what_could_not_be_stored_is_printed(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from llsa_gen import tune
    from llsa_gen.tune.search import StageResult, Trial

    before, after = {"num_warps": 2}, {"num_warps": 4}
    trials = [Trial(after, 50.0), Trial(before, reason="the search ended here: OutOfMemoryError: full")]
    report = tune.Report(
        "tiny", "cuda:90", "A GPU", 4096, "bfloat16", (StageResult("attend", before, 100.0, after, 50.0, trials),),
        ({"stage": "attend", "set": after},), None, "cuda_90.json: No space left on device",
    )  # fmt: skip
    monkeypatch.setattr(tune, "tune", lambda *_, **__: report)
    result = call("tune tiny")
    assert result.code == 1 and result.out.endswith('{"stage": "attend", "set": {"num_warps": 4}}\n')
    assert result.err == (
        "warning: the search ended here: OutOfMemoryError: full\n"
        "what was found is not stored: cuda_90.json: No space left on device\n"
    )


LAST_WORDS = """\
import atexit, os, sys
class Late:
    def __del__(self, write=os.write):
        write(2, b"taken apart\\n")
sys.late = Late()
if {triton}:
    import triton
sys.argv = ["llsa-gen", *{words}]
from llsa_gen.cli import commands as cli
app = cli.app
cli.app = lambda **named: (atexit.register(print, "said at exit"), app(**named))  # as a library does, once imported
cli.main()
"""


@pytest.mark.parametrize("triton", [False, True])
@pytest.mark.parametrize(("words", "code"), [(["--version"], 0), (["explain", "gone"], 2), (["export", "gone"], 1)])
def test_a_process_with_triton_ends_before_python_is_taken_apart(
    words: list[str], code: int, triton: bool, place: Path
) -> None:
    program = LAST_WORDS.format(words=words, triton=triton)
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=100,
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])},
    )  # fmt: skip
    assert done.returncode == code
    assert done.stdout.endswith("said at exit\n")
    assert done.stderr.endswith("taken apart\n") != triton


@pytest.mark.slow
def test_nothing_is_printed_but_what_is_ours(place: Path) -> None:
    """Where kernels in Gluon are compiled for the first time: Triton 3.9 would list what its bindings have leaked."""
    spec = ROOT / "spec" / "llsa_l1.yaml"
    done = real(f"export {spec} -o out --target cuda:90", TRITON_CACHE_DIR=str(place / "triton"))
    assert (done.code, done.err) == (0, "compiling for cuda:90, bfloat16 ...\n")


def test_a_process_of_its_own_exits_as_it_should(place: Path) -> None:
    done = real("explain tiny -n 100 --json")
    assert (done.code, done.err, done.json["n_tokens"]) == (0, "", 100)
    failed = real("explain tinny -n 100")
    assert (failed.code, failed.out) == (1, "")
    assert failed.err == "spec/tinny.yaml: expected a spec file, got no such file; did you mean spec/tiny.yaml?\n"
    assert real("explain tiny").code == 2


def test_the_script_is_installed(place: Path) -> None:
    script = Path(sys.executable).parent / "llsa-gen"
    result = subprocess.run([script, "--version"], capture_output=True, text=True, timeout=600)
    assert (result.returncode, result.stdout) == (0, f"llsa-gen {__version__}\n")
