"""Ablation, throughput and curves: they run, store a row each, and do nothing twice."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType

import ablation
import checkpoints
import compare_graph
import draw_curves
import profile_step
import pytest
import rows
import settings
import throughput
import torch
import yaml
from PIL import Image
from tiny_runs import SMALL, small
from train import process_of

FILES = sorted((Path(ablation.__file__).parent / "experiments").glob("*.yaml"))


def flags(**changes: object) -> list[str]:
    return [f"--{name.replace('_', '-')}={value}" for name, value in (SMALL | changes).items() if name != "attention"]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_every_experiment_is_a_model(path: Path) -> None:
    content = yaml.safe_load(path.read_text(encoding="utf-8"))
    for one in content["experiments"].values():
        wanted = settings.Settings.model_validate(content["base"] | one)
        spec = ablation.attention.spec_of(wanted.attention)
        assert spec is None or spec.head_dim == wanted.channels // wanted.heads


def test_an_ablation_stores_a_row_a_run_and_runs_nothing_twice(
    pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file, out = tmp_path / "file.yaml", tmp_path / "out"
    experiments = {"dense": {"attention": "dense"}, "ours": {"attention": "small"}, "raster": {"order": "raster"}}
    file.write_text(yaml.safe_dump({"base": {"attention": "small"}, "experiments": experiments}))
    command = ["ablation.py", str(file), "--out", str(out), "--seeds", "2", *flags(steps=2, data=pictures)]
    monkeypatch.setattr(sys, "argv", command)
    ablation.main()
    found = json.loads((out / "rows.json").read_text())
    assert [(row["experiment"], row["settings"]["seed"]) for row in found] == [
        (name, seed) for seed in (0, 1) for name in experiments
    ]
    assert all(row["validation"] > 0 and row["steps"] == 2 and row["machine"]["torch"] for row in found)
    printed = capsys.readouterr().out
    assert "| ours " in printed and "±" in printed

    monkeypatch.setattr(ablation, "run", lambda *_: pytest.fail("run again"))
    ablation.main()
    curves = tmp_path / "curves.png"
    monkeypatch.setattr(sys, "argv", ["ablation.py", "--table", str(out / "rows.json"), "--curves", str(curves)])
    ablation.main()
    assert capsys.readouterr().out.count("| dense ") == 2 and curves.stat().st_size > 1000


def test_runs_beside_each_other_are_runs_one_after_the_other(
    pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "file.yaml"
    experiments = {name: {"attention": name} for name in ("dense", "none")}
    file.write_text(yaml.safe_dump({"base": {}, "experiments": experiments}))
    found = []
    for parallel in ("1", "2"):
        out = tmp_path / parallel
        changes = flags(steps=2, data=pictures, depth=1, samples=2, sample_steps=1)
        command = ["ablation.py", str(file), "--out", str(out), "--seeds", "1", "--parallel", parallel, *changes]
        monkeypatch.setattr(sys, "argv", command)
        ablation.main()
        made = ablation.latest(rows.read(out / "rows.json"))
        found.append({name: made[name][0]["curve"][-1]["validation"] for name in ("dense", "none")})
        with Image.open(out / "samples.png") as sheet:
            assert sheet.width > 2 * 16 + sheet.height
    assert found[0] == found[1]


def test_a_table_says_how_much_more_than_the_first_seed_by_seed() -> None:
    values = {"dense": (0.1, 0.2), "ours": (0.11, 0.21)}
    found = [
        {"experiment": name, "place": place, "settings": {"seed": seed}, "validation": value, "loss": value,
         "tokens_per_s": 2e6, "steps": 5, "parallel": 1 + seed}
        for place, (name, of) in enumerate(values.items()) for seed, value in enumerate(of)
    ]  # fmt: skip
    found.reverse()  # the first of the file need not be done first
    line = ablation.shown(found).splitlines()[-1]
    cells = ["ours", "0.1600 ±0.0707", "+7.5 ±3.5%", "0.1600 ±0.0707", "2,000", "5", "2"]
    assert [cell.strip() for cell in line.strip("|").split("|")] == cells


def test_a_table_compares_the_seeds_that_all_experiments_have() -> None:
    found = [
        {"experiment": name, "place": place, "settings": {"seed": seed}, "validation": seed, "loss": 0.0,
         "tokens_per_s": None, "steps": 5}
        for place, (name, seeds) in enumerate({"dense": (1, 2), "ours": (1, 2, 3)}.items()) for seed in seeds
    ]  # fmt: skip
    assert {name: list(of) for name, of in ablation.comparable(found).items()} == {"dense": [1, 2], "ours": [1, 2]}
    *_, dense, ours, _, left_out = ablation.shown(found).splitlines()
    assert dense.count("1.5000 ±") == 1 and ours.count("1.5000 ±") == 1
    assert left_out == "left out: 1 of seeds that not every experiment was trained with"
    assert len(ablation.comparable(found[1:3])["dense"]) == 1  # 2 beside 1: no seed that both have
    assert "left out" not in ablation.shown(found[1:3])


def test_seeds_come_one_after_the_other_and_the_first_draws() -> None:
    jobs = ablation.jobs_of({"a": small(samples=4), "b": small(samples=2)}, range(3, 5))
    assert [(name, one.seed, one.samples) for name, one in jobs] == [("a", 3, 4), ("b", 3, 2), ("a", 4, 0), ("b", 4, 0)]


@pytest.mark.slow
def test_a_killed_ablation_leaves_no_process_and_goes_on_with_the_same_bits(pictures: Path, tmp_path: Path) -> None:
    file = tmp_path / "file.yaml"
    file.write_text(yaml.safe_dump({"base": {"attention": "none"}, "experiments": {"a": {}, "b": {"order": "raster"}}}))
    changes = {"data": str(pictures), "depth": 1, "log_every": 1, "checkpoint_every": 10}
    out = tmp_path / "killed"
    command = [sys.executable, ablation.__file__, str(file), "--out", str(out), "--seeds=1", "--parallel=2"]
    endless = [*command, *flags(steps=10**9, **changes)]  # on a busy machine one may be done before the other begins
    killed = subprocess.Popen(endless, stdout=subprocess.PIPE)
    begun = [out / f"{name}-0" / "checkpoints" for name in "ab"]
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and killed.poll() is None and not all(map(checkpoints.there, begun)):
        time.sleep(0.01)
    killed.kill()
    assert all(map(checkpoints.there, begun)) and not (out / "rows.json").exists()
    killed.communicate(timeout=5)  # ends when nothing is left that holds the other end of the pipe

    steps = 20 + max(int(checkpoints.there(folder)[-1].stem.removeprefix("step_")) for folder in begun)
    subprocess.run([*command, *flags(steps=steps, **changes)], check=True, capture_output=True)
    for name, order in (("a", "2d"), ("b", "raster")):
        ablation.run(tmp_path / name, small(attention="none", order=order, steps=steps, **changes))
        logs = [draw_curves.lines_of(folder) for folder in (out / f"{name}-0", tmp_path / name)]
        found = [[(x["step"], x.get("loss"), x.get("validation")) for x in lines] for lines in logs]
        assert found[0] == found[1] and found[0][-1][0] == steps


def die(*_: object) -> None:
    os._exit(1)


def test_an_ablation_whose_process_dies_says_so(
    pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "file.yaml"
    file.write_text(yaml.safe_dump({"base": {"attention": "none"}, "experiments": {"a": {}}}))
    command = ["ablation.py", str(file), "--out", str(tmp_path / "out"), "--parallel", "2", *flags(data=pictures)]
    monkeypatch.setattr(sys, "argv", command)
    monkeypatch.setattr(ablation, "run", die)  # in another process
    with pytest.raises(SystemExit, match="a process died, and with it all runs; the same command goes on"):
        ablation.main()


def test_throughput_stores_rows_and_adds_to_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(throughput, "BUDGET_SECONDS", 0.01)
    out = tmp_path / "rows.json"
    own = [flag for flag in flags(depth=1, batch=2) if not flag.startswith(("--size", "--compile"))]
    common = ["--modes", "none", "--out", str(out), *own]
    for attentions in (["dense", "small"], ["none", "dense", "--without", "8x12:dense"]):
        monkeypatch.setattr(sys, "argv", ["throughput.py", "--sizes", "8x12", "--attentions", *attentions, *common])
        throughput.main()
    found = json.loads(out.read_text())
    assert [row["attention"] for row in found] == ["dense", "small", "none"]
    assert all(row["tokens"] == 2 * 96 and row["step_ms"] > 0 for row in found)
    assert [row["tokens_per_s"] * row["step_ms"] for row in found] == pytest.approx([1e3 * 192] * 3)
    assert throughput.shown(found).count("8×12") == 3


def test_a_step_that_is_timed_learns(tmp_path: Path) -> None:
    learner, step = throughput.prepared(small(batch=2, accumulate=2))
    first = float(step())
    assert float([step() for _ in range(20)][-1]) < first
    assert learner.part == 1 and process_of("cpu").ranks == 1


def test_kernels_are_told_apart() -> None:
    named = {
        "attend_hopper_kernel": "attention", "grad_kv_l0_hopper_kernel": "attention", "select_l2_kernel": "attention",
        "cudnn_generated_fort_native_sdpa_sm90_flash_bprop_wgmma": "attention",
        "nvjet_sm90_tst_128x256_64x4_1x2_h_bz_coopA_TNT": "products", "triton_tem_fused_mm_3": "products",
        "sm90_xmma_gemm_bf16bf16_bf16f32_f32_tn_n": "products", "triton_red_fused_add_native_layer_norm_4":
        "fused by inductor", "void at::native::multi_tensor_apply_kernel<FusedAdam>": "optimiser",
        "Memcpy DtoD (Device -> Device)": "copies", "void something_else": "other",
    }  # fmt: skip
    assert {kernel: profile_step.kind_of(kernel) for kernel in named} == named


def test_what_attention_adds_is_told_from_steps_and_kernels() -> None:
    kernels = {
        "dense": {"flash_fwd": (60.0, 2.0), "nvjet_a": (4.0, 3.0)}, "none": {"nvjet_a": (4.0, 3.0)},
        "llsa_l2": {"attend_kernel": (1.5, 2.0), "grad_q_kernel": (0.5, 2.0), "nvjet_a": (4.0, 3.0)},
    }  # fmt: skip
    kinds = {name: profile_step.by_kind(of) for name, of in kernels.items()}
    turns = {"dense": [64.0, 90.0, 60.0], "none": [4.0, 5.0, 3.0], "llsa_l2": [8.0, 6.0, 6.5]}
    table, *said = profile_step.shown(turns, kinds).rsplit("\n", 2)
    assert said == ["dense adds 60.00 ms, 1.00 times its own kernels, 60.00 ms",
                    "llsa_l2 adds 2.50 ms, 1.25 times its own kernels, 2.00 ms"]  # fmt: skip
    cells = {row.split("|")[1].strip(): row.split("|")[2:-1] for row in table.splitlines()}
    numbers = {kind: [float(x) for x in of] for kind, of in cells.items() if kind in ("attention", "all kernels")}
    assert numbers == {"attention": [60, 0, 2], "all kernels": [64, 4, 6]}
    assert [float(x) for x in cells["× dense"]] == [1, 16, 9.85]


def test_curves_show_the_lines_of_a_log(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    lines = [{"step": n, "loss": 1 / n, "seconds": float(n)} for n in range(1, 9)]
    lines += [{"step": 4, "validation": 0.5, "seconds": 4.0}, {"step": 8, "validation": 0.25, "seconds": 8.0}]
    (folder / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    read = draw_curves.lines_of(folder)
    assert draw_curves.series(read, "validation", "seconds") == ([4.0, 8.0], [0.5, 0.25])
    assert draw_curves.smoothed([4.0, 2.0, 6.0, 8.0], 2) == [4.0, 3.0, 4.0, 7.0]
    assert draw_curves.validation([{"step": 0, "validation": 1.0, "seconds": 0.0}, *read], "step")[0] == [4, 8]
    draw_curves.draw({"run": read}, tmp_path / "curves.png")
    draw_curves.draw({"run": read}, tmp_path / "one.png", ["seconds"])
    two, one = (Image.open(tmp_path / name).width for name in ("curves.png", "one.png"))
    assert one < two < 2 * one, "a panel a scale"
    with pytest.raises(ValueError, match=r"expected the folder of a run, with log.jsonl in it"):
        draw_curves.lines_of(tmp_path)
    (tmp_path / "copied.jsonl").write_text((folder / "log.jsonl").read_text() + '{"step": 9, "lo')
    assert draw_curves.lines_of(tmp_path / "copied.jsonl") == read  # without a line that a kill cut off


def test_a_table_with_a_narrow_column_is_markdown() -> None:
    assert rows.table(["x", "B", "many"], [["a", "1", "2"]]).splitlines() == [
        "| x   |   B | many |",
        "| --- | --: | ---: |",
        "| a   |   1 |    2 |",
    ]


@pytest.mark.parametrize(
    ("program", "flag"),
    [(throughput, "--compile=model"), (throughput, "--accumulate=2"), (compare_graph, "--cuda-graph=true")],
)
def test_a_setting_that_a_program_varies_is_no_flag_of_its_own(
    program: ModuleType, flag: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["program", flag])
    with pytest.raises(SystemExit):
        program.main()
    assert f"unrecognized arguments: {flag}" in capsys.readouterr().err


@pytest.mark.parametrize("given", [["--attention", "none"], ["--attentions", "dense", "none"]])
def test_a_profile_takes_attentions_and_needs_a_gpu(given: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["profile_step.py", *given])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match="expected a GPU, whose kernels are what is profiled, got none"):
        profile_step.main()


def test_a_profile_of_the_same_twice_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["profile_step.py", "--attentions", "none", "dense", "none"])
    with pytest.raises(SystemExit, match="--attentions: expected names that differ, got none, dense, none"):
        profile_step.main()
