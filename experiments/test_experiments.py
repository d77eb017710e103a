"""Tests of the scripts here, and of what the documents say of their results.

pytest -q experiments
"""

# ruff: noqa: F401, F811 (fixtures come by import)

import functools
import importlib.util
import itertools
import json
import math
import re
import shutil
import signal
import sys
import time
import types
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import fmean

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).parents[1]))
import aem
import envs
from test_aem import (
    HERE,
    Bigram,
    change_row,
    config,
    echo_model,
    mixed,
    mixed_once,
    played,
    played_once,
    run_flags,
    runs,
    tiny,
)


def experiment(name):
    spec = importlib.util.spec_from_file_location(name, HERE / "experiments" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def documents():
    files = [HERE / "README.md", HERE / "experiments" / "README.md"]
    return "\n".join(file.read_text() for file in files if file.exists())


def test_relative_surprisal_equals_the_exact_one(tiny, played):
    relative_surprisal = experiment("diagnose").relative_surprisal
    size = len(tiny.tokenizer)
    policy = aem.Policy(Bigram(size), tiny.tokenizer)
    certainty = torch.rand(size, 1, generator=torch.Generator().manual_seed(0)) * 8
    policy.model.table.weight.data *= certainty  # sure in some states
    p = policy.model.table.weight.detach().double().softmax(-1)
    token_entropy = -(p * p.log()).sum(-1)  # (V,)
    goes_on = p.clone()  # (V, V)
    goes_on[:, policy.end] = 0
    states = [(t, r) for t in played[:6] for r in t.responses]
    for i, (_, r) in enumerate(states):  # any position will do as a state
        r.start -= i
    last = [t.ids[r.start - 1] for t, r in states]
    assert max(token_entropy[last]) > 2 * min(token_entropy[last])
    exact = torch.zeros(size, dtype=torch.float64)
    for limit, tolerance in ((1, 1e-5), (2, 0.1), (3, 0.1)):  # of one token: without noise
        exact = token_entropy + goes_on @ exact
        cfg = config(max_response_tokens=limit)
        relative, h_resp = relative_surprisal(policy, states, 300, cfg)
        assert h_resp.tolist() == pytest.approx(exact[last].tolist(), rel=tolerance)
        surprisals = torch.tensor([-sum(r.logp) for _, r in states])
        assert torch.allclose(relative, surprisals - h_resp, atol=1e-5)
    assert torch.equal(relative, relative_surprisal(policy, states, 300, cfg)[0])
    assert not torch.equal(relative, relative_surprisal(policy, states, 300, cfg, seed=1)[0])


def test_a_run_can_be_diagnosed(runs, monkeypatch, capsys):
    run, folder = runs
    run(name="patient", steps=1)
    diagnose = experiment("diagnose")
    numbers = ["--states", "9", "--samples", "5", "--updates", "2"]
    for flags, file in ((["--start"], "diagnosis-start"), ([], "diagnosis")):
        patient = str(folder / "patient")
        monkeypatch.setattr(sys, "argv", ["diagnose.py", patient, *flags, *numbers])
        diagnose.main()
        result = json.loads((folder / "patient" / f"{file}.json").read_text())
        columns = result["states"]
        assert all(len(column) == 18 for column in columns.values())
        assert len(result["updates"]) == 2 and any(columns["measured"])
        predicted = sum(columns["predicted"][:9])
        assert result["updates"][0]["predicted"] == pytest.approx(predicted, abs=1e-3)
        product = columns["advantage"][0] * (1 - columns["one_minus_alpha"][0])
        product *= columns["relative_surprisal"][0]
        assert columns["predicted"][0] == pytest.approx(product, abs=1e-3)
        assert (folder / "patient" / f"{file}.png").read_bytes()[:4] == b"\x89PNG"
    assert "signs agree" in capsys.readouterr().out
    monkeypatch.setattr(sys, "argv", ["diagnose.py", str(folder / "nobody")])
    with pytest.raises(SystemExit) as stop:
        diagnose.main()
    assert stop.value.code == 2
    assert "nobody is not the folder of a run" in capsys.readouterr().err


def test_bootstrap_and_agreement_by_hand():
    diagnose = experiment("diagnose")
    x, y = torch.tensor([1.0, 2.0, -1.0, 0.0]), torch.tensor([3.0, -1.0, -2.0, 5.0])
    assert diagnose.agreement(x, y) == pytest.approx(2 / 3)  # the state with a zero says nothing
    x = torch.randn(400, generator=torch.Generator().manual_seed(0))
    y = x + torch.randn(400, generator=torch.Generator().manual_seed(1))
    found = diagnose.with_interval(diagnose.correlation, x, y)
    assert found["low"] < found["value"] < found["high"]
    assert found["high"] - found["low"] == pytest.approx(0.1, abs=0.03)


@pytest.fixture
def gpu(monkeypatch, tmp_path):
    """The module, and its command line: a function of flags that returns the results."""
    monkeypatch.syspath_prepend(str(HERE / "experiments"))
    module = importlib.import_module("gpu")
    take_turns = module.bench.take_turns
    monkeypatch.setattr(module.bench, "take_turns", lambda works, _: take_turns(works, 1))  # soon
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))  # the cache of warm starts

    def results(*flags):
        monkeypatch.setattr(sys, "argv", ["gpu.py", "--device", "cpu", "--out", "out", *flags])
        module.main()
        return [json.loads(line) for line in Path("out/results.jsonl").read_text().splitlines()]

    module.results = results
    return module


def test_what_a_gpu_must_show_runs_on_a_cpu(gpu, tmp_path, capsys):
    for part in envs.embedded_policy(envs.GuidedHousehold(), 0, 0.35):
        part.save_pretrained(tmp_path / "model")
    rows = gpu.results("--model", str(tmp_path / "model"))
    assert [row for row in rows if "error" in row or "stopped" in row] == []
    assert {row["device"] for row in rows} == {"CPU"}
    assert {row["torch"] for row in rows} == {torch.__version__}
    parts = {name: [row for row in rows if row["part"] == name] for name in gpu.NAMES}
    (agreement,) = parts["agreement"]
    assert agreement["equal_ids"] == 1 and agreement["compared_tokens"] > 50
    assert agreement["logp_gap"] == agreement["gradient_difference"] == 0  # a CPU against itself
    token, update = parts["decode"]
    assert token["weight_casts"] == 0 and token["ms"] > 0 and token["floor_ms"] > 0
    assert update["weight_casts"] > 0 and "aten::scaled_dot_product_attention" in token["attention"]
    graphs = parts["compiled"].pop()  # one for each kind of forward, whole models
    assert graphs["ok"] == graphs["total"] == graphs["graphs"] < 8
    assert [row["compiled"] for row in parts["compiled"]] == [False] * 4 + [True] * 4
    for rows in (parts["step"], parts["compiled"][:4], parts["compiled"][4:]):
        assert [row["of"] for row in rows] == ["rollout", "update"] * 2
        gaps = [row["logp_gap"] for row in rows if row["of"] == "update"]
        assert all(0 <= gap < 0.02 for gap in gaps)  # of bfloat16
    assert [row["length"] for row in parts["lengths"]] == [64] * 3 + [96] * 3 + [4096]
    assert parts["trl"]
    assert [(row["of"], row["steps"]) for row in parts["training"]] == [
        (arm, steps) for steps in (1, 2) for arm in ("aem", "plain")
    ]
    assert len(Path("out/metrics-plain.jsonl").read_text().splitlines()) == 3
    assert "equal_ids" in capsys.readouterr().out


def test_a_part_that_fails_or_does_not_fit_leaves_the_others_alone(gpu, monkeypatch, capsys):
    def full(plan):
        yield {"of": "before"}
        raise torch.OutOfMemoryError("no memory")

    def slow(plan):
        while True:
            time.sleep(0.01)

    def quick(plan):
        yield {"of": "quick"}

    def long(plan):
        yield {"of": "long"}

    parts = {full: 0, slow: 0, quick: 1, long: 60}
    monkeypatch.setattr(gpu, "PARTS", parts)
    monkeypatch.setattr(gpu, "NAMES", {part.__name__: part for part in parts})
    names = ["full", "quick", "long", "slow", "quick"]
    rows = gpu.results("--minutes", str((gpu.SAVING + 2) / 60), "--parts", *names)
    assert [row["part"] for row in rows] == ["full", *names]
    assert rows[1]["error"] == "OutOfMemoryError: no memory" and rows[2]["of"] == "quick"
    assert "60 s" in rows[3]["skipped"] and "of" not in rows[3]
    assert "stopped" in rows[4] and "0 s of --minutes are left" in rows[5]["skipped"]
    assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)
    with pytest.raises(SystemExit):
        gpu.results("--model", "nowhere")
    assert "--model nowhere: there is no such folder" in capsys.readouterr().err


def test_rollouts_are_compared_up_to_the_first_other_token(gpu):
    def trajectory(ids, logp, entropy):
        return aem.Trajectory(0, None, None, ids, [aem.Response(2, logp, entropy)])

    ours = [trajectory([7, 7, 1, 2, 3], [-1.0, -1.0, -1.0], [1.0, 1.0, 1.0])]
    theirs = [trajectory([7, 7, 1, 9], [-1.5, 8.0], [1.25, 8.0])]
    found = gpu.compared(ours, theirs)
    assert found["equal_ids"] == 3 / 5 and found["equal_trajectories"] == 0
    assert found["compared_tokens"] == 1
    assert found["logp_gap"] == 0.5 and found["entropy_gap"] == 0.25
    assert gpu.compared(ours, ours)["equal_ids"] == 1


def test_casts_of_weights_are_counted(gpu):
    plan = gpu.Plan("cpu", "tiny", None, **gpu.SMALL)
    with torch.inference_mode():  # where autocast does not keep its copies
        found = next(gpu.decode(plan))
    matrices = [p for p in gpu.built(plan).weights if p.ndim == 2]
    assert found["weight_casts"] == len(matrices)  # each of them for each token


def test_kernels_of_a_profile_are_counted(gpu):
    def event(name, kernel_us=None, shapes=()):
        device = gpu.DeviceType.CPU if kernel_us is None else gpu.DeviceType.CUDA
        time_range = types.SimpleNamespace(elapsed_us=lambda: kernel_us)
        columns = {"device_type": device, "time_range": time_range, "input_shapes": shapes}
        return types.SimpleNamespace(name=name, **columns)

    events = [event("aten::_to_copy", shapes=shapes) for shapes in ([[3, 2], []], [[2, 3], []], [])]
    events += [event("aten::_scaled_dot_product_cudnn_attention"), event("fmha_cutlassF", 500.0)]
    events += [event("gemm", 1000.0), event("gemm", 1500.0)]
    found = gpu.counted(events, {(3, 2)})
    assert found["kernels"] == 3 and found["kernel_ms"] == 3.0
    assert found["weight_casts"] == found["cudnn"] == 1
    assert found["largest_ms"] == {"gemm": 2.5, "fmha_cutlassF": 0.5}
    assert len(found["attention"]) == 2


def test_flops_of_an_update_are_those_that_torch_counts(gpu):
    made = gpu.bench.policy()
    made.model.set_attn_implementation("eager")
    batch = gpu.bench.random_trajectories(made, 3, 64)
    with FlopCounterMode(display=False) as counter:
        aem.accumulate_gradients(made, batch, gpu.bench.settings())
    sampled = sum(len(r.logp) for r in aem.responses_of(batch))
    again = 2 * made.head.weight.numel() * sampled  # the head's chunks, in backward
    shape = made.model.config
    masked = 3 * 2 * shape.num_hidden_layers * shape.hidden_size * 3 * 64**2  # half of the pairs
    assert counter.get_total_flops() - again - masked == gpu.update_flops(made, batch)


def test_random_models_have_the_published_sizes(gpu):
    published = {1_543_714_304: gpu.bench.QWEN_1_5B, 7_615_616_512: gpu.bench.QWEN_7B}  # Qwen2.5's
    for size, shape in published.items():
        assert gpu.bench.policy(shape, device="meta").model.num_parameters() == size


def test_in_the_easy_household_four_actions_suffice_and_what_is_said_is_true():
    env = experiment("easy_household").EasyHousehold()
    for seed in range(200):
        observation, info = env.reset(seed=seed)
        for item in env.items:
            assert f"The {item.name} is in the {item.place}. " in observation
        assert f"The desklamp is in the {env.lamp}. " in observation
        assert observation.count(" is in the ") == len(env.items) + 1
        assert info == {"task_type": "examine"}
        assert len(env.demonstration(seed)) <= 4 and env.success


SMALL_STUDY = {"groups": 2, "group_size": 2, "steps": 1, "eval_tasks": 4, "max_turns": 2}


def test_a_real_model_is_studied_run_by_run(tmp_path, monkeypatch, capsys):
    study = experiment("real_model")
    for part in envs.embedded_policy(envs.GuidedHousehold(), 0, 0.35):
        part.save_pretrained(tmp_path / "model")
    monkeypatch.setattr(study, "SETTINGS", study.SETTINGS | SMALL_STUDY)
    monkeypatch.setitem(study.IMITATION, "warm_steps", 1)
    monkeypatch.setattr(study, "DIAGNOSIS", {"states": 3, "samples": 2, "updates": 1})
    monkeypatch.setattr(study, "RESULTS", tmp_path / "results")
    flags = ["--model", tmp_path / "model", "--cache_dir", tmp_path / "cache"]
    flags += ["--out", tmp_path / "out"]

    def run(*more):
        monkeypatch.setattr(sys, "argv", ["real_model.py", *map(str, [*flags, *more])])
        study.main()
        return [line for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]

    assert len(run("--run", "plain-seed2")) == 2  # the head, and this run
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["plain-seed2"]
    rows = run()
    names = [row.split(" | ")[0] for row in rows]
    arms = ["GRPO, seed 1", "GRPO + AEM, seed 1", "GRPO, seed 2", "GRPO + AEM, seed 2"]
    assert names == ["| run", "| as it came", *(f"| {arm}" for arm in arms)]
    before_rl = [row.split(" | ")[1] for row in rows]
    assert before_rl[2] == before_rl[3] and before_rl[4] == before_rl[5]
    kept = {path.name for path in (tmp_path / "results").iterdir()}
    assert {"before", "plain-seed1", "runs.png", "mechanism.png", "diagnosis-end.json"} < kept
    results = [path.read_bytes() for path in (tmp_path / "results").glob("*/*")]
    assert len(results) == 20
    assert not any(str(tmp_path).encode() in result for result in results)
    monkeypatch.setattr(study.aem, "train", None)  # nothing is left to do
    assert run() == run("--report") == rows
    with pytest.raises(SystemExit, match="2"):
        run("--run", "aem-seed9")
    error = capsys.readouterr().err.splitlines()[-1]
    assert "argument --run: invalid choice: 'aem-seed9' (choose from " in error
    assert all(name in error for name in study.plan())


def test_the_table_of_estimators_comes_from_the_committed_results(capsys):
    experiment("estimators").report()
    table = capsys.readouterr().out
    text = documents()
    for line in table.splitlines()[1:-2]:
        name, before, after, *_ = line.split()
        assert f"| `{name}` |" in text, line
        assert f"{before} to {after}".replace("%", " %") in text, line


def test_the_documents_say_of_the_real_model_what_its_results_say(tmp_path, monkeypatch, capsys):
    study = experiment("real_model")
    shutil.copytree(study.RESULTS, tmp_path / "results")
    monkeypatch.setattr(study, "RESULTS", tmp_path / "results")
    study.report()
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    assert len(rows) == 6 and all(row in documents() for row in rows)
    cells = [row.split(" | ") for row in rows[1:]]
    before, after = [[float(row[i].rstrip("%") or -1) for row in cells] for i in (1, 3)]
    told = [before[0], before[1], *after[1:3], before[3], *after[3:]]
    readme = (HERE / "README.md").read_text().split("## A small model on a laptop")[1]
    assert re.findall(r"(\d+) %", readme) == [f"{percent:.0f}" for percent in told]


def test_the_table_of_memory_is_what_its_script_prints():
    assert "\n".join(experiment("memory").table()) in documents()


def test_the_study_runs_each_run_once_and_goes_on_where_it_stopped(tmp_path, monkeypatch, capsys):
    replicate = experiment("replicate")
    quick = {"steps": 2, "eval_every": 2, "eval_tasks": 16, "warm_steps": 20, "groups": 2}
    quick |= {"group_size": 4, "max_turns": 3, "max_response_tokens": 6}
    monkeypatch.setattr(replicate, "RESULTS", tmp_path)
    monkeypatch.setattr(replicate, "QUICK", quick | {"cache_dir": str(tmp_path / "cache")})
    monkeypatch.setattr(replicate, "ProcessPoolExecutor", lambda *_: ThreadPoolExecutor(1))
    monkeypatch.setattr(torch, "set_num_threads", lambda n: None)
    file = tmp_path / "runs.jsonl"
    replicate.quick(2)
    first = [json.loads(line) for line in file.read_text().splitlines()]
    file.write_text("".join(json.dumps(line) + "\n" for line in first[:3]))
    replicate.quick(2)
    again = [json.loads(line) for line in file.read_text().splitlines()]
    assert capsys.readouterr().out.count("| grpo | 0.0007, 0.0007 | 2 |") == 2
    pairs = sorted((line["flags"]["aem"], line["seed"]) for line in first)
    assert pairs == [(False, 1), (False, 2), (True, 1), (True, 2)]
    assert all(len(line["curves"]["success"]) == 3 and line["ended"] == "" for line in first)
    assert again[:3] == first[:3]
    for name in ("flags", "seed", "after", "curves"):
        assert again[3][name] == first[3][name]
    flags = replicate.setting("household", "grpo + AEM", lr=1e-3) | replicate.QUICK
    replicate.mechanism(flags, states=9, samples=3, updates=1)
    for when in ("start", "middle", "end"):
        found = json.loads((tmp_path / f"mechanism-{when}.json").read_text())
        assert len(found["states"]["advantage"]) == 9


def test_empg_equals_a_slow_one(mixed):
    replicate = experiment("replicate")
    cfg = config(aem=False)
    base = aem.assign_credit(mixed, cfg).tolist()
    found = replicate.empg_credit(aem.assign_credit, mixed, cfg).tolist()
    rows = []  # (A, H_bar, H_bar of the next turn) of what is trained on
    number = 0
    for t in mixed:
        h_bars = [sum(r.entropy) / len(r.entropy) for r in t.responses]
        for h, after in zip(h_bars, [*h_bars[1:], None]):
            if not t.masked:
                rows.append((base[number], h, after))
            number += 1
    low, high = min(h for _, h, _ in rows), max(h for _, h, _ in rows)

    def confidence(h):
        return math.exp(-(h - low) / (high - low))

    scale = fmean(confidence(h) for _, h, _ in rows)
    values = []
    for a, h, after in rows:
        clarity = 0.0 if after is None else 0.05 * confidence(after)
        values.append(a * confidence(h) / scale + clarity)
    expected = iter([x - fmean(values) for x in values])
    masked = [t.masked for t in mixed for _ in t.responses]
    for x, left_out in zip(found, masked, strict=True):
        assert x == pytest.approx(0 if left_out else next(expected), abs=1e-9)
    assert any(masked) and not all(masked)
    for r in aem.responses_of(mixed):
        r.entropy = [0.5] * len(r.entropy)
    flat = replicate.empg_credit(aem.assign_credit, mixed, cfg)
    assert flat.isfinite().all() and flat.abs().max() > 0.1
    for t in mixed:
        t.error = "boom"
    assert set(replicate.empg_credit(aem.assign_credit, mixed, cfg).tolist()) == {0.0}


def test_the_quick_form_of_the_recipe_study_runs(tmp_path, monkeypatch):
    replicate, recipe = experiment("replicate"), experiment("recipe")
    monkeypatch.setattr(recipe, "run_all", replicate.run_all)
    monkeypatch.setattr(replicate, "ProcessPoolExecutor", lambda *_: ThreadPoolExecutor(1))
    monkeypatch.setattr(torch, "set_num_threads", lambda n: None)
    short = {"steps": 2, "eval_every": 2, "eval_tasks": 8, "warm_steps": 20, "groups": 2}
    short |= {"group_size": 4, "max_turns": 3, "max_response_tokens": 6}
    results = recipe.quick(1, tmp_path, **short, cache_dir=str(tmp_path / "cache"))
    assert [result["flags"]["aem"] for result in results] == [False, True, False]
    assert [result["flags"].get("empg", False) for result in results] == [False, False, True]
    assert all(len(result["curves"]["updates"]) == 3 for result in results)
    assert len((tmp_path / "runs.jsonl").read_text().splitlines()) == 3
    assert len(recipe.cells()) == 2 * (len(recipe.STEPS) + len(recipe.ESTIMATORS))


def test_the_readme_says_of_the_study_what_its_results_say(tmp_path, monkeypatch, capsys):
    replicate, results = experiment("replicate"), HERE / "experiments" / "results"
    shutil.copytree(results, tmp_path / "results")
    monkeypatch.setattr(replicate, "RESULTS", tmp_path / "results")
    replicate.report()
    printed = capsys.readouterr().out
    assert printed == (results / "report.md").read_text()
    rows = [line for line in documents().splitlines() if line.startswith("| ") and ", p = " in line]
    recipe = experiment("recipe")
    recipe.tables(recipe.finished(HERE / "experiments" / "recipe"))
    of_recipe = capsys.readouterr().out
    assert of_recipe == (HERE / "experiments" / "recipe" / "report.md").read_text()
    numbers = [row.split(" | ", 1)[1] for row in rows]  # controls have names of their own there
    assert len(rows) >= 20 and all(row in printed + of_recipe for row in numbers)
    readme = (HERE / "README.md").read_text()
    shown = re.findall(r"^\| (\S+) \| (\d\S* ± \S+) \| (.*?) \| (.*?) \| (.*?) \|$", readme, re.M)
    assert len(shown) == 5
    main = printed.split("**household: without AEM, with AEM**")[1]
    for name, without, with_aem, end, area in shown:
        row = re.search(rf"^\| {re.escape(name)} \|.*", main, re.M)[0]
        assert f"{without} | {with_aem} | {end}, p" in row and f"{area}, p" in row
    output = (HERE / "experiments" / "default_run" / "output.txt").read_text()
    printed_lines = re.findall(r"^    (\S.*\d%.*)$", readme, re.M)
    assert len(printed_lines) == 2 and all(line in output for line in printed_lines)
    figures = {path.name for path in results.glob("*.png")}
    assert len(figures) == 6 and all(name in documents() for name in figures)


def test_a_run_of_the_study_that_ends_early_stays_where_it_was(runs, tmp_path, monkeypatch):
    monkeypatch.setattr(torch, "set_num_threads", lambda n: None)
    change_row(monkeypatch, "dapo", overlong=0.0)
    flags = run_flags(tmp_path, env="test_aem:Alike", estimator="dapo", max_resample=1)
    flags |= {"steps": 3, "eval_every": 3, "eval_tasks": 16, "groups": 2, "group_size": 4}
    flags["model"] = echo_model(runs[1])
    del flags["out"]
    line = experiment("replicate").run(flags, 1)
    assert "--max_resample" in line["ended"]
    success = line["curves"]["success"]
    assert success == success[:1] * 4 and line["after"] == line["before"]  # it never moved


def test_masks_by_predicted_drift_keep_the_responses_of_one_sign(mixed):
    masked = functools.partial(experiment("replicate").modulate_and_mask, aem.modulate)
    base = aem.assign_credit(mixed, config())
    alpha = aem.modulate(mixed, config(), 1)
    kept = {mask: masked(mask, mixed, config(), 1) for mask in ("raise", "lower")}
    for mask, sign in (("raise", 1), ("lower", -1)):
        wanted = sign * base * (1 - alpha) > 0
        assert wanted.any() and torch.equal(kept[mask], torch.where(wanted, alpha, 0.0))
    assert torch.equal((kept["raise"] + kept["lower"]) * base, (alpha * base) * (alpha != 1))
    gated = masked("lower", mixed, config(min_range=100.0), 1)  # alpha = 1 predicts nothing
    assert not gated.any()


def test_the_study_reports_what_its_results_say(tmp_path, monkeypatch, capsys):
    replicate = experiment("replicate")
    monkeypatch.setattr(replicate, "RESULTS", tmp_path)

    def write(flags, seed):
        end = 0.5 + 0.02 * flags["aem"] - 0.1 * abs(math.log2(flags["lr"] / 8e-4))
        if seed < 100:
            end += 0.01 * seed
        if flags.get("aem_direction") == "reverse":
            end += 0.03 if seed % 2 else -0.01
        curves = dict.fromkeys(replicate.KEPT, [end / 2, end, end])
        line = {"flags": flags, "seed": seed, "curves": curves, "seconds": 1, "ended": ""}
        line |= {"before": {"all": 0.3}, "after": {"all": end, "heat": 0.4 * end}}
        with open(tmp_path / "runs.jsonl", "a") as file:
            file.write(json.dumps(line) + "\n")

    for arm, lr in itertools.product(replicate.ARMS, replicate.RATES):
        for seed in replicate.MAPPED if arm in replicate.PAIR else replicate.TUNING:
            write(replicate.setting("household", arm, lr=lr), seed)
    reported = replicate.reported(replicate.finished(), "household").values()
    for flags, seed in itertools.product(reported, replicate.SEEDS):
        write(flags, seed)
    replicate.report()
    printed = capsys.readouterr().out
    same_rates = "| 0.0008, 0.0008 | 8 |"
    # Ends 51 ... 58 %: mean 54.5, standard error sqrt(6 / 8). All eight differences of one sign:
    # p = 2 / 2^8.
    main = f"{same_rates} 54.5 ± 2.0 | 56.5 ± 2.0 | +2.0 ± 0.0, p = 0.01 |"
    assert f"| grpo {main} 45.4 ± 1.7 |" in printed
    # Differences +3 and -1 in turn: mean 1, standard error sqrt(32 / 7 / 8); the sum is 8 or more
    # in 72 of 256 choices of signs.
    assert f"| reversed {same_rates} 56.5 ± 2.0 | 57.5 ± " in printed
    assert "+1.0 ± 1.8, p = 0.28" in printed
    assert "| grpo + AEM | 42.0 | 42.0 | 52.0 | 42.0 |" not in printed
    assert "| grpo + AEM | 32.0 | 42.0 | 52.0 | 42.0 |" in printed
    # Tuning: AEM's 2 points at four rates and two seeds; the curve's mean is 5/6 of its end.
    assert "equal learning rates, all 4 rates, tuning seeds**" in printed
    assert "| gspo | +2.0 ± 0.0, p = 0.01 | +1.7 ± 0.0, p = 0.01 |" in printed
    assert "| gspo | 54.5 | 21.8 |" in printed
    # The map: AEM leads by 1.7 points on all three seeds, so that these cells are run again, on
    # the seeds of the main table.
    cells = printed.split("\n**household: cells of the map where AEM looked best")
    assert [part.count("as in the main table, ") for part in cells[-2:]] == [4, 4]
    cell = f"| as in the main table, 0.0008 {same_rates}"
    assert f"{cell} 54.5 ± 2.0 | 56.5 ± 2.0 | +2.0 ± 0.0, p = 0.01 |" in cells[-2]
    assert f"{cell} 56.5 ± 2.0 | 56.5 ± 2.0 | +0.0 ± 0.0, p = 1.00 |" in cells[-1]
    for name in ("dynamics", "drift", "drift-small", "regimes"):
        assert (tmp_path / f"{name}.png").read_bytes()[:4] == b"\x89PNG"
