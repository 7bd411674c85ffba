"""Ablation, throughput and curves: they run, store a row each, and do nothing twice."""

import json
import sys
from pathlib import Path

import ablation
import draw_curves
import profile_step
import pytest
import rows
import settings
import throughput
import yaml
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
    monkeypatch.setattr(sys, "argv", ["ablation.py", str(file), "--out", str(out), "--table"])
    ablation.main()
    assert capsys.readouterr().out.count("| dense ") == 2


def test_throughput_stores_rows_and_adds_to_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(throughput, "BUDGET_SECONDS", 0.01)
    out = tmp_path / "rows.json"
    common = ["--modes", "none", "--out", str(out), *flags(depth=1, batch=2)]
    for attentions in (["dense", "small"], ["none"]):
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


def test_curves_show_the_lines_of_a_log(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    lines = [{"step": n, "loss": 1 / n, "seconds": float(n)} for n in range(1, 9)]
    lines += [{"step": 4, "validation": 0.5, "seconds": 4.0}, {"step": 8, "validation": 0.25, "seconds": 8.0}]
    (folder / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    read = draw_curves.lines_of(folder)
    assert draw_curves.series(read, "validation", "seconds") == ([4.0, 8.0], [0.5, 0.25])
    assert draw_curves.smoothed([4.0, 2.0, 6.0, 8.0], 2) == [4.0, 3.0, 4.0, 7.0]
    draw_curves.draw({"run": read}, tmp_path / "curves.png")
    assert (tmp_path / "curves.png").stat().st_size > 1000
    with pytest.raises(ValueError, match=r"expected the folder of a run, with log.jsonl in it"):
        draw_curves.lines_of(tmp_path)


def test_a_table_with_a_narrow_column_is_markdown() -> None:
    assert rows.table(["x", "B", "many"], [["a", "1", "2"]]).splitlines() == [
        "| x   |   B | many |",
        "| --- | --: | ---: |",
        "| a   |   1 |    2 |",
    ]
