"""Tests of rlep.py, in the order of the file: the equations first, bad input and resuming last.
Nothing is downloaded. Those marked cuda run where there is a GPU."""
import copy
import inspect
import json
import math
import multiprocessing
import os
import random
import re
import resource
import runpy
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from contextlib import nullcontext
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

# Before transformers is imported, as a download shall fail; and for the processes that tests start.
os.environ |= {"HF_HUB_OFFLINE": "1", "PYTHONPATH": os.path.dirname(__file__)}

import numpy as np
import pytest
import torch
import transformers
from tokenizers import decoders, normalizers, processors
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

import rlep
from rlep import Answer, Config, ExperiencePool, Policy, Problem, UserError, main, verify

torch.set_num_threads(1)
HERE = Path(__file__).parent
SOURCE = (HERE / "rlep.py").read_text()
DEMO = [word for name, value in rlep.EMBEDDED.items() for word in (f"--{name}", f"{value}")]
RUN = DEMO + ("--threads 1 --base_steps 60 --steps 6 --learning_rate 2e-3 --prompts_per_step 4 "
              "--minibatch_prompts 2 --max_new_tokens 24 --save_every 2 --collect_temperature 2 "
              "--collect_top_p 1 --sample_rows 64").split()
TRAIN = DEMO + ("--threads 1 --prompts_per_step 2 --minibatch_prompts 1 --group_size 8 --k 2 "
                "--max_new_tokens 8 --overlong_buffer 7 --seed 1").split()  # it learns to be short

# ---- Helpers and fixtures ------------------------------------------------------------------------
def write_rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)
def read_rows(path):
    return [json.loads(line) for line in Path(path).read_text().splitlines()]
def chat(text):
    return [{"role": "user", "content": text}]
def settings(model, **changes):
    """The embedded problems' configuration for the CPU."""
    fixed = {"model": str(model), "device": "cpu", "micro_tokens": 1024}
    return Config(**rlep.EMBEDDED | fixed | changes)
def step_config(**changes):
    return settings("", **dict(group_size=16, max_new_tokens=6, minibatch_prompts=1) | changes)
def load(model, **changes):
    return Policy(settings(model, **changes), [Problem("1*2+3*4 mod 10 = ", "4")])
def snapshot(folder):
    """Every file below a folder, byte for byte."""
    files = sorted(path for path in Path(folder).rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}
def result_of(folder):
    """What a run leaves, whatever happened on the way: policies, rows without timings."""
    return {name: re.sub(rb'"\w+_s": [\d.e-]+', b"", content)
            for name, content in snapshot(folder).items()
            if re.search(r"(^|/)policy/|(pool|metrics|answers)\.jsonl$", name)}
def spy_on(name):
    """While it is open, calls of a function of rlep are noted."""
    return mock.patch.object(rlep, name, wraps=getattr(rlep, name))
def failing_after(calls, real, fault):
    """A function that raises a fault after so many calls of the real one."""
    def failing(*given, **named):
        if not left:
            raise fault
        return left.pop()(*given, **named)
    left = [real] * calls
    return failing
def crash(name, number, words):
    """Runs a command that dies at so many-th call of a function of rlep."""
    failing = failing_after(number - 1, getattr(rlep, name), SystemExit("crash"))
    with mock.patch.object(rlep, name, failing), pytest.raises(SystemExit, match="crash"):
        main(words)
def cut(path):
    """Leaves the first half of a file."""
    path.write_bytes(path.read_bytes()[:path.stat().st_size // 2])
def edit(**changes):
    """A function that changes values in a JSON file."""
    return lambda path: path.write_text(json.dumps(json.loads(path.read_text()) | changes))
def write(text):
    """A function that writes a file."""
    return lambda path: path.write_text(text, errors="surrogateescape")
@pytest.fixture(scope="session")
def files(tmp_path_factory):
    """A folder with problems whose answer is 7."""
    folder = tmp_path_factory.mktemp("files")
    rows = [{"prompt": chat(problem.question), "answer": "7"}
            for problem in rlep.embedded_problems(400, seed=1) if problem.gold == "7"]
    write_rows(folder / "train.jsonl", rows[:16])
    write_rows(folder / "held_out.jsonl", rows[16:24])
    return folder
@pytest.fixture(scope="session")
def tiny(files):
    """The folder of an untrained model."""
    rlep.save_untrained(files / "tiny", 0)
    return files / "tiny"
@pytest.fixture
def policy(tiny):
    return load(tiny)
@pytest.fixture(scope="session")
def data(files):
    """The flags of the problems whose answer is 7."""
    return ["--data", f"{files}/train.jsonl", "--eval_data", f"{files}/held_out.jsonl"]
@pytest.fixture(scope="session")
def finished(files, data):
    """The folder of a complete, undisturbed run; tests do not change it."""
    assert main(["run", *RUN, *data, "--out", f"{files}/run"]) == 0
    return files / "run"
@pytest.fixture(scope="session")
def words(tiny, data):
    """words(out, flags ...): a train command on the untrained model."""
    return lambda out, *more: ["train", *TRAIN, *data, "--model", f"{tiny}", "--out", f"{out}",
                               *map(str, more)]
@pytest.fixture(scope="session")
def trained(files, words):
    """The folder of an undisturbed train of 6 steps; tests do not change it."""
    assert main(words(files / "trained", "--steps", 6)) == 0
    assert all(row["trained_tokens"] for row in read_rows(files / "trained/metrics.jsonl")[1:])
    return files / "trained"
@pytest.fixture
def error(capsys):
    """error(words): the one line that a command ends with, which must have status 2."""
    def error(words):
        capsys.readouterr()
        try:
            status, usage = main(list(map(str, words))), []
        except SystemExit as end:  # a bad flag
            status, usage = end.code, ["usage: rlep.py [COMMAND] [--FLAG VALUE ...]"]
        *others, line = capsys.readouterr().err.splitlines()
        assert others == usage and line.startswith("rlep.py: error: ") and status == 2
        return line
    return error
def make_model(kind="Llama", **changes):
    """A random model with sharp predictions, so that a wrong position or mask shows."""
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(**BASE | changes)
    return getattr(transformers, f"{kind}ForCausalLM")(config).eval()
def mini_batch(vocabulary=40, advantages=torch.linspace(-1, 1, 12)):
    """Three groups of four answers, of lengths from 1 on; some members of a group are as long."""
    rng, lengths = random.Random(0), (3, 9, 1, 5, 1, 12, 7, 3, 3, 1, 16, 2, 8, 11, 4)
    prompts = [[rng.randrange(2, vocabulary) for _ in range(length)] for length in lengths]
    return [Answer(prompts[i // 4], response, advantage=float(advantages[i]))
            for i, response in enumerate(prompts[3:])]
def slow_logprobs(model, prompt, response, temperature=1.0):
    """One answer, alone and unpadded, through the model's own logits."""
    logits = model(torch.tensor([prompt + response])).logits[0, len(prompt) - 1:-1] / temperature
    return logits.log_softmax(-1)[range(len(response)), response]
def gradients(model):
    return torch.cat([weight.grad.flatten().double() for weight in model.parameters()])

# ---- The equations -------------------------------------------------------------------------------
def test_overlong_penalty():
    """None up to limit - buffer, factor at the limit, a line between; buffer 0: off."""
    penalties = [rlep.overlong_penalty(length, 100, 20, 0.5) for length in (1, 80, 81, 90, 100)]
    assert penalties == pytest.approx([0, 0, -0.025, -0.25, -0.5])
    assert rlep.overlong_penalty(90, 100, 20) == -0.5 and rlep.overlong_penalty(99, 99, 0) == 0

def test_eq1_and_eq5_advantages():
    """By hand, with the paper's two replayed successes; exactly 0; against a slow loop."""
    rewards, ids = torch.tensor([-1.0] * 16 + [1.0] * 2), torch.zeros(18, dtype=torch.long)
    advantages = rlep.group_advantages(rewards, ids).tolist()
    assert advantages == pytest.approx([-0.3436] * 16 + [2.7487] * 2, abs=1e-4)
    for size, reward in ((2, 1.0), (3, 0.1), (7, 0.1), (18, 1 / 3), (9, 1e-8), (7, 12345.678)):
        assert not rlep.group_advantages(torch.full((size,), reward), ids[:size]).any()
    rng, expected = random.Random(0), []
    ids = [rng.choice([11, 5, 8, 2]) for _ in range(60)] + [99, 98, 98]
    rewards = [rng.choice([-1.0, 1.0, 0.25, -1.7]) for _ in ids[:-2]] + [0.0, 2e-6]
    for reward, group in zip(rewards, ids):
        own = [r for r, g in zip(rewards, ids) if g == group]
        mean, std = (np.mean(own), np.std(own, ddof=1)) if len(own) > 1 else (0.0, 1.0)
        expected.append((reward - mean) / (std + 1e-6))
    advantages = rlep.group_advantages(torch.tensor(rewards), torch.tensor(ids))
    assert advantages.tolist() == pytest.approx(expected, abs=1e-5)

@pytest.mark.parametrize("ratio, advantage, dual, objective, slope, clip", [
    (1.0, 2.0, 10.0, 2.0, 2.0, None), (1.27, 1.0, 10.0, 1.27, 1.27, None),
    (1.5, 1.0, 10.0, 1.28, 0.0, "clip_high"), (20.0, 1.0, 10.0, 1.28, 0.0, "clip_high"),
    (0.5, 1.0, 10.0, 0.5, 0.5, None), (1.5, -1.0, 10.0, -1.5, -1.5, None),
    (0.81, -1.0, 10.0, -0.81, -0.81, None), (0.5, -1.0, 10.0, -0.8, 0.0, "clip_low"),
    (20.0, -1.0, 10.0, -10.0, 0.0, "dual_clip"), (20.0, -3.0, 4.0, -12.0, 0.0, "dual_clip"),
    (20.0, -1.0, None, -20.0, -20.0, None), (20.0, -1.0, 0, -20.0, -20.0, None)])
def test_eq3_loss_of_one_token(ratio, advantage, dual, objective, slope, clip):
    """Each side of each clip: value, gradient, which clip is counted; any mask, NaN outside it."""
    for dtype, tokens, share in ((torch.bool, None, 1), (torch.long, 2, 0.5), (torch.half, 2, 0.5)):
        logprobs = torch.tensor([[math.log(ratio) - 1.0, math.nan]]).double().requires_grad_()
        loss, stats = rlep.policy_loss(
            logprobs, torch.tensor([[-1.0, -5.0]]).double(), torch.tensor([advantage]).double(),
            torch.tensor([[1, 0]]).to(dtype), dual_clip=dual, num_tokens=tokens)
        loss.backward()
        assert loss.item() == pytest.approx(-objective * share)
        assert logprobs.grad[0].tolist() == pytest.approx([-slope * share, 0.0])
        assert stats == {name: (name == clip) * share for name in ("clip_low", "clip_high")}

@pytest.mark.parametrize("dual", [10.0, 0])
def test_a_ratio_beyond_all_bounds(dual):
    """Log-ratios count up to 20 only: e**100 is infinite in fp32, its gradient NaN."""
    for log_ratio, advantage, objective, slope in (
            (100.0, 1.0, 1.28, 0.0), (100.0, -1.0, -(dual or math.exp(20)), 0.0),
            (-100.0, 1.0, math.exp(-20), 0.0), (-19.0, 1.0, math.exp(-19), math.exp(-19))):
        logprobs = torch.tensor([[log_ratio - 101.0]], requires_grad=True)
        loss, _ = rlep.policy_loss(logprobs, torch.tensor([[-101.0]]), torch.tensor([advantage]),
                                   torch.ones(1, 1), dual_clip=dual)
        loss.backward()
        assert [loss.item(), logprobs.grad.item()] == pytest.approx([-objective, -slope], rel=1e-5)

# ---- Reward and experience pool (section 3.2) ----------------------------------------------------
def pool_row(question, gold, *candidates):
    return {"data_source": "math", "prompt": chat(question), "ability": "MATH",
            "reward_model": {"ground_truth": gold, "style": "rule", "candidates": list(candidates)},
            "extra_info": {"index": 0}}

def test_pool(tmp_path):
    """At most m, none twice, all alike; the authors' rows; loading verifies again."""
    pool, texts = ExperiencePool(), [f"zwölf {'so ' * i}\n\\boxed{{2}}" for i in range(5)]
    system, path, counts = (("system", "Think."),), tmp_path / "pool.jsonl", Counter()
    assert all(pool.add("q", "2", text, system) for text in texts) and pool.add("r", "4", "A: 4")
    assert not pool.add("q", "2", "\\boxed{3}", system) and not pool.add("s", "3", "")
    for seed in range(1000):
        drawn = pool.draw("q", 2, random.Random(seed), system)
        assert len(set(drawn)) == 2
        counts.update(drawn)
    assert set(counts) == set(texts) and min(counts.values()) > 320 and len(pool) == 6
    rng = random.Random(0)
    assert sorted(pool.draw("q", 9, rng, system)) == sorted(texts) and not pool.draw("q", 9, rng)
    assert pool.add("q", "2", texts[0], system) and len(pool) == 7  # twice counts twice
    assert pool.texts_of(Problem("unsolved", "3")) == []
    pool.save(path)
    with pytest.raises(OSError):
        pool.save(tmp_path)  # a folder, which stays
    row, *others = read_rows(path)
    assert row["prompt"] == [{"role": "system", "content": "Think."}, *chat("q")]
    assert row["reward_model"] == {"ground_truth": "2", "style": "rule",
                                   "candidates": [*texts, texts[0]]} and "data_source" in row
    row["reward_model"]["candidates"].append("\\boxed{3}")
    again = ExperiencePool.load(write_rows(path, [row, *others]))
    del pool.entries[Problem("unsolved", "3").key]
    assert again.entries == pool.entries and len(pool.entries) == 2
    with mock.patch.object(rlep, "score", side_effect=KeyError), pytest.raises(KeyError):
        ExperiencePool.load(path)  # the fault of a reward of one's own, not of the file

# ---- The training step ---------------------------------------------------------------------------
@pytest.fixture
def two_problems():
    """Two problems, and a pool with three answers to the first one only."""
    (problem, other), pool = rlep.embedded_problems(2, 5), ExperiencePool()
    pool.texts_of(problem).extend(f"{x}\\boxed{{{problem.gold}}}" for x in ("", "Work: ", "1"))
    return [problem, other], pool

def test_groups(policy, two_problems):
    """G fresh answers, M of its own where a question has some; seed, step and question decide."""
    (problems, pool), parts = two_problems, []
    groups = rlep.make_groups(policy, problems, pool, step_config(overlong_buffer=4), 1)
    counts = [Counter(answer.replayed for answer in group) for group in groups]
    assert counts == [{False: 16, True: 2}, {False: 16}]
    for problem, group in zip(problems, groups):
        for answer in group:
            penalty = rlep.overlong_penalty(len(answer.response), 6, 4)
            assert answer.prompt == policy.encode_prompt(problem)
            assert answer.correct == verify(policy.decode(answer.response), problem.gold)
            assert answer.reward == (1 if answer.correct else -1) + penalty
    replays = [answer for answer in groups[0] if answer.replayed]
    assert all(answer.correct and answer.response[-1] == 1 for answer in replays)
    texts = {policy.decode(answer.response) for answer in replays}
    assert texts < set(pool.texts_of(problems[0])) and len(texts) == 2
    pool.entries = {problem.key: (problem, [f"1+{i}" for i in range(9)]) for problem in problems}
    for seed, step in ((0, 1), (0, 2), (1, 1), (0, 1)):
        config = step_config(replays=4, seed=seed)
        for group in rlep.make_groups(policy, problems, pool, config, step):
            parts += [[a.response for a in group if a.replayed == old] for old in (False, True)]
    assert parts[:4] == parts[-4:] and all(parts[:12].count(part) == 1 for part in parts)

@pytest.mark.parametrize("kind, changes", [
    ("Llama", {"attention_dropout": 0.5}), ("Llama", {"num_key_value_heads": 4}),
    ("Qwen2", {}), ("Qwen2", {"hidden_size": 8, "tie_word_embeddings": True})])
def test_eq4_update_equals_a_slow_loop(kind, changes, policy, monkeypatch):
    """Log-probs, loss and gradient; one mean over the mini-batch, however it is cut; no dropout."""
    policy.model, advantages = make_model(kind, **changes), torch.linspace(-99, 99, 12)
    advantages[[1, 4, 5, 6, 7]] = 0.0  # among them a whole group
    answers, losses, kept = mini_batch(advantages=advantages), [], []
    answers = [answers[i] for i in (3, 8, 0, 1, 2, 9, 4, 5, 11, 10, 6, 7)]  # some prompts return
    double = copy.deepcopy(policy.model).double()
    slow = [slow_logprobs(double, a.prompt, a.response, 0.8) for a in answers]
    logprobs, mask = policy.logprobs(answers, 0.8)
    assert mask.sum(1).tolist() == list(map(len, slow)) and not logprobs[~mask].any()
    assert torch.allclose(logprobs[mask], torch.cat(slow).float(), atol=2e-5)
    for answer, own in zip(answers, slow):
        answer.old_logprobs = (own.detach() + torch.randn(len(own))).float()
        for new, old in zip(own, answer.old_logprobs.double()):  # one token, as in the test above
            losses.append(rlep.policy_loss(new.view(1, 1), old.view(1, 1), torch.tensor(
                [answer.advantage]).double(), torch.ones(1, 1), 0.1, 0.4, 2.5)[0])
    loss = sum(losses) / len(losses)
    loss.backward()
    gradient, optimizer = gradients(double), torch.optim.SGD(policy.model.parameters())
    optimizer.register_step_pre_hook(lambda *_: kept.append(gradients(policy.model)))
    monkeypatch.setattr(policy, "logprobs", mock.Mock(wraps=policy.logprobs))
    config = settings("", temperature=0.8, clip_low=0.1, clip_high=0.4, dual_clip=2.5)
    assert gradient.norm() > 2
    for config.micro_tokens, number in ((1, 7), (40, 3), (60, 2), (1000, 1)):
        policy.logprobs.reset_mock()
        stats = rlep.update_policy(policy, optimizer, answers, config, 0.0)
        assert (kept[-1] - gradient / gradient.norm()).norm() < 1e-4  # its norm is scaled to 1
        assert stats["grad_norm"] == pytest.approx(gradient.norm().item(), rel=1e-5)
        assert stats["loss"] == pytest.approx(loss.item(), abs=2e-5) and stats["skipped"] == 0
        assert stats["clip_low"] > 0 and stats["clip_high"] > 0
        assert policy.logprobs.call_count == number
    answers[0].old_logprobs[0] = math.nan  # and no step is taken
    assert rlep.update_policy(policy, optimizer, answers, config, 0.0) == {"skipped": 1}
    assert len(kept) == 4

def test_eq5_a_step(policy, two_problems, monkeypatch):
    """One baseline with the replays; all old log-probs are of the policy at the step's start."""
    (problem, other), pool = two_problems
    third, right = Problem("1*1 mod 10 = ", "1"), pool.texts_of(problem)
    start, seen, real = copy.deepcopy(policy.model), [], rlep.update_policy
    def update(policy, optimizer, answers, config, rate):
        seen.append((answers, [answer.old_logprobs for answer in answers], rate))
        return real(policy, optimizer, answers, config, rate)
    monkeypatch.setattr(rlep, "score", lambda asked, text: len(text) % 3 if asked == third else
                        1.0 if text in right else -1.0)
    monkeypatch.setattr(rlep, "update_policy", update)
    policy.ends, problems = [1, 0, 2], [problem, third, other]
    config = step_config(temperature=0.6, learning_rate=0.08, lr_warmup_steps=4)
    optimizer = torch.optim.AdamW(policy.model.parameters())
    row = rlep.train_step(policy, optimizer, problems, pool, config, 1)
    (first, olds, rate), (second, more, _), (last, none, _) = seen
    assert [a.advantage for a in first] == pytest.approx([-0.3436] * 16 + [2.7487] * 2, abs=1e-4)
    assert [(a.advantage, old) for a, old in zip(last, none)] == [(0.0, None)] * 16
    for answer, old in zip(first + second, olds + more):
        begun, now = (slow_logprobs(model, answer.prompt, answer.response, 0.6)
                      for model in (start, policy.model))  # which has changed by then
        assert torch.allclose(old, begun, atol=1e-5) and not torch.allclose(old, now, atol=0.01)
    fresh = [answer for answer in first + second + last if not answer.replayed]
    assert row["replays"] == 2 and row["zero_variance"] == pytest.approx(1 / 3)
    cut = [answer.response[-1] > 2 for answer in fresh]  # not if it ends at the limit
    assert 0 < row["truncated"] == np.mean(cut) < np.mean([len(a.response) == 6 for a in fresh])
    assert row["accuracy"] == np.mean([answer.correct for answer in fresh]) > 0
    assert all(answer.correct == (answer.reward > 0) for answer in second)  # your own score
    # Entropy: minus the log-probs, at the start of the step, of fresh answers with an advantage.
    surprise = [-slow_logprobs(start, a.prompt, a.response, 0.6) for a in fresh if a.advantage]
    assert row["entropy"] == pytest.approx(torch.cat(surprise).mean().item(), abs=1e-5)
    config.minibatch_prompts = 2
    rlep.train_step(policy, optimizer, problems, pool, config, 9)
    assert rate == 0.02 and [(len(a), new) for a, _, new in seen[3:]] == [(34, 0.08), (16, 0.08)]

def test_ratios_begin_at_1_in_bf16(tiny, two_problems, monkeypatch):
    """Exactly, however the mini-batches are cut: both log-probs come from the same micro-batches."""
    policy, (problems, pool), seen = load(tiny, bf16=1), two_problems, []
    real = rlep.policy_loss
    def loss(logprobs, old_logprobs, advantages, mask, *rest):
        seen.append((logprobs - old_logprobs)[mask].abs().max().item())
        return real(logprobs, old_logprobs, advantages, mask, *rest)
    monkeypatch.setattr(rlep, "policy_loss", loss)
    monkeypatch.setattr(rlep, "score", lambda problem, text: len(text) % 3.0)
    optimizer = torch.optim.AdamW(policy.model.parameters())
    config = step_config(micro_tokens=60, learning_rate=0.0, group_size=9)
    rlep.train_step(policy, optimizer, problems, pool, config, 1)
    assert len(seen) > 2 and max(seen) == 0

def test_metrics_without_gradient_are_null(policy, two_problems, monkeypatch, capsys):
    """Where no group teaches, no entropy; where no update is taken, no loss, but it is said."""
    optimizer, values = torch.optim.AdamW(policy.model.parameters()), iter([-1.0] * 32)
    work = [policy, optimizer, two_problems[0], ExperiencePool(), step_config(), 1]
    monkeypatch.setattr(rlep, "score", lambda problem, text: next(values, len(text) % 3.0))
    row = rlep.train_step(*work)
    assert row["entropy"] is None and row["zero_variance"] == 1 and row["grad_norm"] == 0
    assert "skipped" not in capsys.readouterr().out
    with spy_on("policy_loss") as loss:  # NaN in the first update, not in the second
        loss.side_effect = [(torch.tensor(math.nan, requires_grad=True), {}), mock.DEFAULT]
        assert rlep.train_step(*work)["skipped"] == 0.5
    assert "1 of 2 updates skipped" in (line := capsys.readouterr().out) and "--bf16 0" in line
    some = dict(loss=2.0, clip_low=0.5, clip_high=0.0, grad_norm=3.0, skipped=0)
    group = mini_batch(advantages=range(12))  # the first teaches nothing
    for answer in group:
        answer.old_logprobs = torch.zeros(len(answer.response))
    for updates, expected in (([{"skipped": 1}] * 2, dict.fromkeys(some) | {"skipped": 1}),
                              ([some, {"skipped": 1}], some | {"skipped": 0.5})):
        metrics = rlep.metrics_of(policy, [group], updates)
        assert {name: metrics[name] for name in some} == expected
    assert metrics["sampled_tokens"] == metrics["length"] * 12 == 73
    assert metrics["trained_tokens"] == 73 - len(group[0].response)

# ---- The phases ----------------------------------------------------------------------------------
def test_run_leaves_everything(finished):
    """Every file, with what other programs read; RLEP alone replays; the pool is verified."""
    summary = read_rows(finished / "summary.json")[0]
    for arm in ("vanilla", "rlep"):
        [own], rows, answers = (read_rows(finished / arm / name) for name in
                                ("summary.json", "metrics.jsonl", "answers.jsonl"))
        assert [row["step"] for row in rows] == list(range(7)) and summary[arm] == own
        assert own["curve"] == [[r["step"], r["mean_at_k"]] for r in rows if "mean_at_k" in r]
        assert [step for step, _ in own["curve"]] == [0, 3, 6] and own["seed"] == 0
        assert own["curve"][0] == summary["vanilla"]["curve"][0]  # the same base
        assert own["arm"] == ("RLEP, M = 2" if arm == "rlep" else "vanilla RL")
        for place, (step, share) in enumerate(own["curve"]):
            marks = [row["correct"] for row in answers[8 * place:][:8] if row["step"] == step]
            assert np.shape(marks) == (8, 4) and np.mean(marks) == share
        assert all(r["correct"] == [verify(text, "7") for text in r["texts"]] for r in answers)
        assert all((0 < row["replays"] <= 8) == (arm == "rlep") for row in rows[1:])
        assert not any(row["skipped"] for row in rows[1:])
        assert rows[-1]["reward"] > rows[1]["reward"] + 0.2  # it learns
    held = [row["reward_model"]["candidates"] for row in read_rows(finished / "pool.jsonl")]
    assert summary["questions"] == len(held) >= 4 and summary["answers"] == sum(map(len, held))
    assert all(len(texts) >= 2 and all(verify(t, "7") for t in texts) for texts in held)
    assert (finished / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert not list(finished.rglob("*.partial"))

def test_both_arms_see_the_same_questions(finished, words, tmp_path, monkeypatch):
    """In one order, 14 of 15 an epoch, also where the pool has none; a step has its own seeds."""
    real, rows = rlep.make_groups, read_rows(finished / "pool.jsonl")[:5]
    pool, known = write_rows(tmp_path / "pool", rows), {r["prompt"][0]["content"] for r in rows}
    seen = {"vanilla": [], "rlep": []}
    def spy(policy, problems, *rest):
        with spy_on("rollout") as rollout:
            groups = real(policy, problems, *rest)
        seeds = sum([call.kwargs["seeds"] for call in rollout.mock_calls], [])
        for problem, group, seed in zip(problems, groups, seeds, strict=True):
            seen[arm].append((problem.question, seed))
            number = 2 if arm == "rlep" and problem.question in known else 0
            assert sum(answer.replayed for answer in group) == number
        return groups
    monkeypatch.setattr(rlep, "make_groups", spy)
    more = ["--max_new_tokens", 24, "--train_size", 15, "--steps", 14]
    for arm, flags in (("vanilla", more), ("rlep", [*more, "--pool", pool])):
        assert main(words(tmp_path / arm, *flags)) == 0
        assert "mean_at_k" in read_rows(tmp_path / arm / "metrics.jsonl")[-1]  # always at the end
    questions, seeds = zip(*seen["rlep"])
    assert seen["vanilla"] == seen["rlep"] and len(set(seeds)) == len(seeds) == 28
    first, second = questions[:14], questions[14:]
    assert len(set(first)) == len(set(second)) == 14 and first != second

def test_replays(policy, tmp_path, error, words):
    """Judged by the training file's gold; one that is too long is left out; a foreign pool ends."""
    rows = [pool_row("a", "2", "\\boxed{2}"), pool_row("b", "4", "\\boxed{4}"),
            pool_row("c", "5", "\\boxed{5}", "1\\boxed{5}", "12\\boxed{5}")]
    problems, path = [Problem("c", "5"), Problem("a", "3")], write_rows(tmp_path / "pool", rows)
    config = settings("", max_new_tokens=5, replays=3)  # \boxed{, 5, } and <eos> are 4 tokens
    groups = rlep.make_groups(policy, problems, ExperiencePool.load(path), config, 1)
    replays = [[(policy.decode(answer.response), answer.reward) for answer in group
                if answer.replayed] for group in groups]
    assert sorted(replays[0]) == [("1\\boxed{5}", 1.0), ("\\boxed{5}", 1.0)]
    assert replays[1] == [("\\boxed{2}", -1.0)]
    assert path in error(words(tmp_path / "run", "--pool", path))

def test_collection_has_its_own_sampling_and_rules(tiny, data, tmp_path, monkeypatch):
    """Its temperature, top-p, K; the score decides; cut answers do not count; two are needed."""
    policy, seen, texts = load(tiny), [], ["\\boxed{9}", "1+6=9\\boxed{9}", "\\boxed{7}"]
    right, other, wrong = (policy.encode_answer(Problem("1", ""), text) for text in texts)
    groups = [[right, other, wrong], [right, other[:-1], wrong], [right, right, other],
              *[[wrong, wrong, right]] * 13]
    def sample(policy, problems, k, config, *purpose):
        seen.append((k, config.temperature, config.top_p))
        return [(problem, groups.pop(0)) for problem in problems]
    monkeypatch.setattr(Policy, "sample", sample)
    monkeypatch.setattr(rlep, "score", lambda problem, text: text.count("9"))  # the gold is 7
    command = ["collect", *RUN, *data, "--model", f"{tiny}", "--out", f"{tmp_path}/out"]
    assert main(command + "--temperature 0.5 --top_p 0.6 --collect_temperature 1.7 --collect_top_p "
                "0.9 --collect_k 3 --prompts_per_step 3".split()) == 0
    assert set(seen) == {(3, 1.7, 0.9)} and not groups
    held = [row["reward_model"]["candidates"] for row in read_rows(tmp_path / "out/pool.jsonl")]
    assert held == [texts[:2], [texts[0], *texts[:2]]]

def test_bf16_goes_on(finished, words, tmp_path):
    """With --bf16 1, too, a stopped run ends as an undisturbed one."""
    more = ["--steps", 3, "--bf16", 1, "--max_new_tokens", 24, "--pool", finished / "pool.jsonl"]
    assert main(words(tmp_path / "whole", *more)) == 0
    crash("train_step", 3, words(tmp_path / "stopped", *more))
    assert main(words(tmp_path / "stopped", *more)) == 0
    assert result_of(tmp_path / "stopped") == result_of(tmp_path / "whole")

# ---- Sampling (section 3.1) ----------------------------------------------------------------------
@torch.no_grad()
def slow_rollout(model, prompt, group_size, limit, seed, ends, temperature, top_p):
    """One answer at a time without a cache, from the same uniform numbers."""
    uniform = torch.rand(limit, group_size, generator=torch.Generator().manual_seed(seed))
    answers = [[] for _ in range(group_size)]
    for member, answer in enumerate(answers):
        while len(answer) < limit and not set(ends) & set(answer):
            logits = model(torch.tensor([prompt + answer])).logits[:, -1]
            number = uniform[len(answer), member:member + 1]
            answer.append(rlep.sample_tokens(logits, number, temperature, top_p).item())
    return answers

@pytest.mark.parametrize("kind", ["Llama", "Qwen2"])
@pytest.mark.parametrize("temperature, top_p, ends", [(1.0, 1.0, [1]), (1.5, 0.9, [1, 5, 9])])
def test_sampling_equals_a_slow_loop(kind, temperature, top_p, ends, policy):
    """As configured, seeds from seed, purpose and question; rows that ended leave."""
    policy.model = policy.sampler = make_model(kind, initializer_range=0.15)
    policy.sampler.register_forward_pre_hook(lambda _, inputs: rows.extend(map(len, inputs)))
    prompts = {Problem(str(answer.prompt), ""): answer.prompt for answer in mini_batch()}
    rows, problems, policy.encode_prompt, policy.ends = [], list(prompts), prompts.get, ends
    config = settings("", temperature=temperature, top_p=top_p, max_new_tokens=60, seed=3)
    found = list(policy.sample(problems, 4, config, "test", 4))
    flat = [answer for _, answers in found for answer in answers]
    assert rows[0] == 12 and len(rows) <= max(map(len, flat)) + 7
    assert len(rows) > 40 or len(ends) > 1  # the cache has grown more than once
    for t in range(8, len(rows), 8):  # every 8 tokens, answers that have ended leave
        assert rows[t] == sum(len(answer) > t for answer in flat)
    for problem, answers in found:
        seed = rlep.seed_of(3, "test", 4, problem.key)
        assert answers == slow_rollout(policy.sampler, prompts[problem], 4, 60, seed, ends,
                                       temperature, top_p)
    assert [problem for problem, _ in found] == problems and len(set(map(len, flat))) > 3
    for config.sample_rows in (1, 8):
        rows.clear()
        assert list(policy.sample(problems, 4, config, "test", 4)) == found
        assert max(rows) == max(4, config.sample_rows)
    assert list(policy.sample(problems[1:2], 4, config, "test", 4)) == found[1:2]
    one, two = (rlep.rollout(policy.model, [[5, 6]], 8, max_new_tokens=9, eos_token_id=1,
                             pad_token_id=0) for _ in range(2))  # without seeds
    assert one != two and len(set(map(tuple, one[0]))) == 8

@pytest.mark.parametrize("top_p, kept", [
    (0.45, [3]), (0.55, [3, 1]), (0.85, [3, 1, 2]), (0.96, [3, 1, 2, 4]), (1, [3, 1, 2, 4])])
def test_top_p_keeps_the_smallest_set(top_p, kept):
    """At its own odds; the ends of torch.rand draw possible tokens only, NaN no others."""
    odds = torch.tensor([0.0, 0.3, 0.15, 0.5, 0.05, 0.0])
    uniform = torch.cat([torch.arange(10_000) / 10_000, torch.tensor([1 - 2.0**-24])])
    logits = (odds.log() / 2 + 3).expand(len(uniform), -1)
    tokens = rlep.sample_tokens(logits, uniform, 0.5, top_p)
    expected = np.array([float(odds[i]) * (i in kept) for i in range(6)])
    shares = np.bincount(tokens, minlength=6) / len(uniform)
    assert shares == pytest.approx(expected / expected.sum(), abs=3e-4)
    assert set(tokens.tolist()) == set(kept)
    assert rlep.sample_tokens(torch.full((1, 6), math.nan), uniform[-1:], 1.0, 1.0).item() < 6
    assert len(rlep.sample_tokens(torch.zeros(10_001, 4), uniform, 1.0, 0.5).unique()) == 2
    half = logits.bfloat16()  # the odds are fp32
    assert torch.equal(*(rlep.sample_tokens(x, uniform, 0.5, top_p) for x in (half, half.float())))

# ---- Log-probabilities of models of many kinds ---------------------------------------------------
BASE = dict(vocab_size=40, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
            num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=512,
            initializer_range=0.25, pad_token_id=0, eos_token_id=1, bos_token_id=None)
LONGROPE = {"rope_type": "longrope", "rope_theta": 1e4, "original_max_position_embeddings": 40,
            "factor": 2.0, "short_factor": [1.0] * 4, "long_factor": [4.0] * 4}
HEADS, WINDOW = BASE | dict(head_dim=8), BASE | dict(use_sliding_window=True, sliding_window=8,
                                                     max_window_layers=1)
VISION = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
              image_size=28, patch_size=14)
LONG = "--steps 1 --max_new_tokens 40 --overlong_buffer 40 --prompts_per_step 99 --model".split()

@pytest.fixture
def model_folder(tiny, tmp_path):
    """model_folder(kind, settings): a random model with sharp predictions, and tiny's tokenizer."""
    def make(kind, settings):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **settings))
        AutoTokenizer.from_pretrained(tiny).save_pretrained(tmp_path / "model")
        model.save_pretrained(tmp_path / "model")
        return tmp_path / "model"
    return make

@pytest.mark.parametrize("kind, settings", [
    ("qwen2", BASE | dict(use_sliding_window=False, sliding_window=8)), ("qwen2", WINDOW),
    ("qwen3", HEADS), ("mistral", BASE | dict(sliding_window=8)),
    ("gemma3_text", HEADS | dict(sliding_window=8)),
    ("gemma3", dict(text_config=HEADS | dict(sliding_window=8), vision_config=VISION,
                    mm_tokens_per_image=1, image_token_id=39, boi_token_id=38, eoi_token_id=37)),
    ("mixtral", BASE | dict(num_local_experts=4, num_experts_per_tok=2, router_jitter_noise=0.3)),
    ("gpt2", BASE | dict(resid_pdrop=0.5, embd_pdrop=0.5, attn_pdrop=0.5)),
    ("opt", BASE | dict(ffn_dim=48, word_embed_proj_dim=32, layerdrop=0.5, dropout=0.5))])
def test_good_models_train_right(kind, settings, model_folder, words, tmp_path):
    """All equals plain passes, also short windows and prompts of one token; no dropout; a step."""
    folder, rng = model_folder(kind, settings), random.Random(0)
    policy, plain = load(folder), AutoModelForCausalLM.from_pretrained(folder).eval()
    prompts = [[rng.randrange(2, 22) for _ in range(9)]] * 2 + [[5, 6, 7], [4]]
    responses = [[rng.randrange(2, 22) for _ in range(n)] for n in (40, 7, 21, 3)]
    logprobs, mask = rlep.response_logprobs(policy.model, [*map(tuple, prompts)], responses)
    slow = torch.cat([slow_logprobs(plain, *pair) for pair in zip(prompts, responses)])
    assert torch.allclose(logprobs[mask], slow, atol=1e-4)
    (logprobs.sum() + slow.sum()).backward()
    for ours, theirs in zip(policy.model.parameters(), plain.parameters()):
        if theirs.grad is not None:
            assert (ours.grad - theirs.grad).norm() < 1e-3 * theirs.grad.norm() + 1e-5
    assert rlep.rollout(plain, prompts[1:], 2, max_new_tokens=20, temperature=0, eos_token_id=1,
                        pad_token_id=0) == [
        slow_rollout(plain, prompt, 2, 20, 0, [1], 0, 1.0) for prompt in prompts[1:]]
    assert main(words(tmp_path / "run", *LONG, folder)) == 0
    row = read_rows(tmp_path / "run/metrics.jsonl")[1]
    assert row["trained_tokens"] and row["skipped"] == 0 and math.isfinite(row["loss"])

def test_micro_batches():
    """With padding; in order of length class, then prompt; without those that have no gradient."""
    prompts = [[3] * 5, [2] * 9, [1] * 5]
    answers = [Answer(prompts[i % 3], [0] * (1 + i % 4), advantage=1.0) for i in range(12)]
    answers.append(Answer(prompts[0], [0]))
    answers[3].response = [0] * 30
    found = [[(answer.prompt[0], len(answer.response)) for answer in batch]
             for batch in rlep.micro_batches(answers, 24)]
    assert found == [[(1, 1), (3, 1)], [(2, 1), (1, 3)], [(1, 2), (3, 3), (3, 2)], [(2, 2), (2, 3)],
                     [(1, 4)], [(2, 4)], [(3, 30)]]
    assert [len(batch) for batch in rlep.micro_batches(answers, 1000)] == [12]
    ragged = [Answer([1], [0] * 10, advantage=1.0), Answer([1] * 5, [0], advantage=1.0)]
    assert len(rlep.micro_batches(ragged, 29)) == 2  # two prompts of 5 and two rows of 10 tokens
    group = [Answer([1] * 20, [0] * 2, advantage=1.0) for _ in range(5)]  # its prompt counts once
    for most, expected in ((30, [5]), (29, [4, 1])):
        assert [len(batch) for batch in rlep.micro_batches(group, most)] == expected

# ---- The policy ----------------------------------------------------------------------------------
TURNS = ("{% for m in messages %}{{ m['content'] }}{% if m['role'] == 'assistant' %}|\n<end>"
         "{% endif %}{% endfor %}{% if add_generation_prompt %}?<eos>{% endif %}")

@pytest.mark.parametrize("listed", [True, False])
def test_prompts_and_responses(listed, policy, tmp_path):
    """The template; the end of a turn, also if only added (Gemma, Phi); stops; other specials."""
    end, think = (transformers.AddedToken(word, special=True) for word in ("<end>", "<think>"))
    policy.tokenizer.add_tokens(["|", end])  # | is not special, and the line's end is unknown
    if listed:
        policy.tokenizer.add_special_tokens({"additional_special_tokens": ["<end>"]})
    assert (23 in policy.tokenizer.all_special_ids) == listed
    policy.tokenizer.add_tokens([think])
    policy.tokenizer.chat_template = TURNS
    policy.tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<pad> $A <eos>", special_tokens=[("<pad>", 0), ("<eos>", 1)])  # not for a chat
    policy.model.resize_token_embeddings(25)
    policy.model.generation_config.eos_token_id = [1, 5] if listed else 0
    policy.save(f"{tmp_path}/model/")
    policy, problem = load(tmp_path / "model"), Problem("2=", "3", (("system", "1+"),))
    assert set(policy.ends) == {23, *([1, 5] if listed else [0])}
    assert policy.encode_prompt(problem) == [7, 16, 8, 18, 21, 1]
    assert policy.encode_answer(problem, "7*3=1") == [13, 17, 9, 18, 7, 23]
    assert policy.encode_answer(problem, "7<end>*<think>3<end>") == [13, 17, 24, 9, 23]
    assert policy.decode([13, 17, 24, 9, 23]) == "7*<think>3" and policy.decode([13, 17]) == "7*"

def test_answers_are_read_behind_their_prompt(policy):
    """On its own, a text would begin with another token; unless one reaches across the border."""
    policy.tokenizer.backend_tokenizer.normalizer = normalizers.Prepend("?")
    problem, answer = Problem("2=", "3"), [13, 17, 1]
    assert policy.tokenizer("7*", add_special_tokens=False).input_ids == [21, 13, 17]
    assert policy.encode_prompt(problem) == [21, 8, 18]
    assert policy.encode_answer(problem, "7*") == answer
    policy.tokenizer.backend_tokenizer.normalizer = None
    policy.tokenizer.add_tokens(["=7"])
    assert policy.encode_prompt(problem, "7*") == [8, 22, 17]
    assert policy.encode_answer(problem, "7*") == answer

def test_a_first_space_is_kept(policy):
    """Tokenizers such as Llama 2's drop a text's first space: a replay would have other tokens."""
    policy.tokenizer.backend_tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("?", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    assert policy.tokenizer.decode([21, 13, 21, 17]) == "7 *"
    assert policy.decode([21, 13, 21, 17, 1]) == " 7 *"

def test_a_template_that_shows_no_answer(tiny, tmp_path):
    """Its first special token does not end an answer then; the tokenizer's eos does."""
    write("{{ '<pad>' + messages[0]['content'] }}")(
        shutil.copytree(tiny, tmp_path / "model") / "chat_template.jinja")
    policy = load(tmp_path / "model")
    assert policy.encode_prompt(Problem("2=", "3")) == [0, 8, 18] and set(policy.ends) == {1}

def test_a_tokenizer_without_a_template(tiny, tmp_path):
    """It gets a plain one, with the token that begins a text."""
    (shutil.copytree(tiny, tmp_path / "model") / "chat_template.jinja").unlink()
    edit(bos_token="<pad>")(tmp_path / "model/tokenizer_config.json")
    policy, problem = load(tmp_path / "model"), Problem("2=", "3", (("system", "1+"),))
    text = policy.tokenizer.decode(policy.encode_prompt(problem)).replace("<unk>", "_")
    assert text == "<pad>1+_2=_" + "_" * len("Answer:")

def test_chat_template_kwargs(tiny, tmp_path):
    """They go to every call of the template: prompts, and what ends an answer."""
    write("{% for m in messages %}{{ m['content'] }}{% endfor %}{{ '<pad>' if thinking else '<eos>'"
          " }}")(shutil.copytree(tiny, tmp_path / "model") / "chat_template.jinja")
    for flag, end in (("true", 0), ("false", 1)):
        policy = load(tmp_path / "model", chat_template_kwargs=f'{{"thinking": {flag}}}')
        assert policy.encode_prompt(Problem("2=", "3")) == [8, 18, end] and policy.ends[0] == end

def test_mixed_precision(tiny):
    """Arithmetic in bf16, weights in fp32 that keep small updates, a copy that follows them."""
    policy, answers = load(tiny, bf16=1), mini_batch(20)
    assert all(weight.dtype == torch.bfloat16 for weight in policy.sampler.parameters())
    logprobs, mask = policy.logprobs(answers, 1.0)
    exact = torch.cat([slow_logprobs(policy.model, a.prompt, a.response) for a in answers])
    assert logprobs.dtype == torch.float32 and 1e-5 < (logprobs[mask] - exact).abs().max() < 0.03
    for answer, row in zip(answers, logprobs.detach()):
        answer.old_logprobs = row[:len(answer.response)]
    optimizer = torch.optim.AdamW(policy.model.parameters(), weight_decay=0.0)
    rlep.update_policy(policy, optimizer, answers, settings(""), 1e-6)
    change = (policy.model.model.norm.weight - 1).abs()  # they were ones
    assert change.median().item() == pytest.approx(1e-6, rel=0.1)
    for _ in range(2):
        rlep.update_policy(policy, optimizer, answers, settings(""), 1e-2)
        next(policy.sample(rlep.embedded_problems(3, 0), 4, settings(""), "test"))
        for mine, trained in zip(policy.sampler.parameters(), policy.model.parameters()):
            assert trained.dtype == torch.float32 and torch.equal(mine, trained.bfloat16())
        for mine, trained in zip(policy.sampler.buffers(), policy.model.buffers()):
            assert mine.dtype == torch.float32 and torch.equal(mine, trained)

class OtherDevice(TorchFunctionMode):
    """What is made without a device, or of such tensors, is as if on a CPU beside a GPU."""
    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs, name = kwargs or {}, function.__name__
        given = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        on_cpu = [hasattr(x, "on_cpu") for x in given]
        if not all(on_cpu) and name not in ("__getitem__", "__setitem__", "__get__"):
            assert not any(c and x.dim() for c, x in zip(on_cpu, given)), f"{name}: two devices"
        result = function(*args, **kwargs)
        made = name in ("tensor", "arange", "zeros", "ones", "rand") and not kwargs.get("device")
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor) and (made or any(on_cpu[:1])):
                tensor.on_cpu = True
        return result.clone() if name == "to" else result

def test_everything_is_on_the_device_of_the_model(policy, two_problems, monkeypatch):
    """No tensor of a step is left on the CPU where the model may be elsewhere."""
    monkeypatch.setattr(rlep, "score", lambda problem, text: len(text) % 3.0)
    optimizer = torch.optim.AdamW(policy.model.parameters())
    with OtherDevice():
        rlep.train_step(policy, optimizer, *two_problems, step_config(top_p=0.9), 1)
        with pytest.raises(AssertionError, match="two devices"):
            policy.model(torch.tensor([[2, 3]]))

@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
@pytest.mark.parametrize("bf16", [0, 1])
def test_cuda(bf16, finished, words, tmp_path):
    """A short run trains on a GPU, and sampling there follows the same numbers."""
    assert main(words(tmp_path, "--steps", 2, "--device", "cuda", "--bf16", bf16, "--pool",
                      finished / "pool.jsonl", "--max_new_tokens", 24)) == 0
    assert read_rows(tmp_path / "metrics.jsonl")[-1]["skipped"] == 0
    model = AutoModelForCausalLM.from_pretrained(finished / "base/policy")
    one, two = (rlep.rollout(model.to(device), [[7, 8, 9]], 4, max_new_tokens=20, seeds=[3],
                             eos_token_id=1, pad_token_id=0) for device in ("cpu", "cuda"))
    assert one == two

# ---- Evaluation ----------------------------------------------------------------------------------
def test_evaluation(policy, tmp_path, monkeypatch):
    """mean@k, pass@k (unbiased); every question, own gold and score; each answer is kept once."""
    correct = [[True, False, False, False], [True] * 4, [False] * 4]
    found = [rlep.mean_at_k(correct), *(rlep.pass_at_k(correct, k) for k in (4, 1, 2))]
    assert found == pytest.approx([5 / 12, 2 / 3, 5 / 12, 1.5 / 3])  # 1 - C(3, 2) / C(4, 2) = 0.5
    problems = rlep.embedded_problems(6, 0)
    texts = ["\\boxed{11}", *(f"\\boxed{{{problem.gold}}}" for problem in problems)]
    wrong, *own = [policy.encode_answer(problems[0], text) for text in texts]
    monkeypatch.setattr(policy, "sample", lambda asked, k, *_: [
        (asked[i], ([own[i]] * (i % 3) + [wrong] * k)[:k]) for i in range(6) if asked == problems])
    monkeypatch.setattr(rlep, "score", lambda problem, text: np.float32(
        1 - verify(text, problem.gold)))
    config, path = settings("", k=2, out=str(tmp_path)), tmp_path / "answers.jsonl"
    row = rlep.evaluate(policy, problems, config, "your own score")
    assert row == pytest.approx({"mean_at_k": 1 / 2, "pass_at_k": 2 / 3}) and not path.exists()
    for step in (0, 5, 0, 3, 6, 3):  # runs that were killed began again at 0 and at 3
        rlep.evaluate(policy, problems, config, "again", step)
    rows = read_rows(path)
    assert [row["step"] for row in rows] == [0] * 6 + [3] * 6
    assert rows[7] == {"step": 3, "question": problems[1].question, "gold": problems[1].gold,
                       "texts": [texts[2], "\\boxed{11}"], "correct": [False, True]}

def test_eval_reproduces_the_summary(finished, files, data, capsys):
    """eval asks each held-out question once, with the run's result; transformers loads it."""
    folder = finished / "rlep/policy"
    with spy_on("rollout") as rollout:
        assert main(["eval", *RUN, *data, "--model", f"{folder}"]) == 0
    [own], printed = read_rows(finished / "rlep/summary.json"), capsys.readouterr().out
    assert f"mean@4 {own['mean_at_k']:.1%}, pass@4 {own['pass_at_k']:.1%}" in printed
    asked = sum([call.args[1] for call in rollout.mock_calls if "seeds" in call.kwargs], [])
    model, tokenizer = (x.from_pretrained(folder) for x in (AutoModelForCausalLM, AutoTokenizer))
    assert [[{"role": "user", "content": tokenizer.decode(prompt)}] for prompt in asked] == [
        row["prompt"] for row in read_rows(files / "held_out.jsonl")]
    theirs = model.generate(torch.tensor(asked[:1]), do_sample=False, max_new_tokens=24)
    assert [[theirs[0, len(asked[0]):].tolist()]] == rlep.rollout(
        model, asked[:1], 1, max_new_tokens=24, temperature=0, eos_token_id=1, pad_token_id=0)
    state = torch.load(finished / "rlep/checkpoint.pt", weights_only=True)
    assert all(torch.equal(state["model"][name], x) for name, x in model.state_dict().items())
    assert state["adam"]["param_groups"][0]["weight_decay"] == 0.1

# ---- Data files ----------------------------------------------------------------------------------
def test_problems_of_files(tmp_path, capsys):
    """Rows as published; the same if chat and question are, and then the first counts."""
    for row, question, gold in (
            ({"question": " Sum?\n", "answer": "\\boxed{1} 6*7=42\n#### 42"}, "Sum?\nBOX", "42"),
            ({"problem": "Find.", "level": "Level 5", "solution":  # MATH; above, GSM8K
              "First \\boxed{1}? No: $x=\\fbox{\\frac{1}{2}}$."}, "Find.\nBOX", "\\frac{1}{2}"),
            ({"prompt": chat("Do."), "reward_model": {"ground_truth": "34"}}, "Do.", "34"),  # DAPO
            ({"problem": "Aya", "solution": "\\boxed{9}", "answer": "204"}, "Aya\nBOX", "204"),
            ({"id": 0, "question": "Cities", "answer": 27.0}, "Cities\nBOX", "27.0"),  # AMC
            ({"question": "q", "reward_model": None, "answer": 0}, "q\nBOX", "0"),
            ({"question": "q", "answer": "", "solution": "so \\boxed{3}"}, "q\nBOX", "3"),
            ({"question": "q", "solution": "6*30, so the answer is: 180."}, "q\nBOX", "180"),
            ({"question": "q", "answer": 10**400}, "q\nBOX", f"{10**400}"),
            (pool_row("r", "3", "\\boxed{3}"), "r", "3")):
        problem = Problem(question.replace("BOX", rlep.BOXED), gold)
        assert rlep.row_to_problem(row, "f:1") == problem
    chats = chat("a"), chat("a"), [{"role": "system", "content": "s"}, *chat("a")], *map(chat, "bc")
    rows = [{"prompt": prompt, "answer": i} for i, prompt in enumerate(chats)]
    train, test = write_rows(tmp_path / "a", rows), write_rows(tmp_path / "b", rows[3:])
    problems, held_out = rlep.load_problems(Config(data=train, eval_data=test, eval_size=1))
    assert problems == [Problem("a", "0"), Problem("a", "2", (("system", "s"),)), Problem("c", "4")]
    assert held_out == [Problem("b", "3")]  # what is held out is not trained on
    assert len(rlep.load_problems(settings("", eval_data=test))[0]) == 512
    write_rows(tmp_path / "a", [{"question": f"{i % 30}", "answer": i} for i in range(40)])
    problems, held_out = rlep.load_problems(Config(data=train, eval_size=8, train_size=15))
    assert [int(p.gold) for p in problems + held_out] == [*range(8, 23), *range(8)]
    assert capsys.readouterr().out.endswith("\ntraining on 15 of 22, held out 8/30\n")
    assert len(rlep.load_problems(Config(data=train, eval_size=8))[0]) == 22  # it is "at most"

# ---- The embedded problems and their base model --------------------------------------------------
def test_embedded_problems():
    """Lengths 2, 3, 4 in turn, golds and noiseless workings right; hard products are guesses."""
    rng, quiet, hard = random.Random(0), random.Random(0), Counter()
    training, held_out = rlep.load_problems(settings(""))
    quiet.random, problems = lambda: 0.95, held_out + training
    assert held_out == rlep.load_problems(settings("", train_size=9))[1]  # whatever the training
    for place, problem in enumerate(problems):
        length = problem.question.count("*")
        assert length == 2 + place % 3 and eval(problem.question[:-10]) % 10 == int(problem.gold)
        working = rlep.write_working(problem.question, quiet)
        steps = working.split("\\")[0].split(",")
        assert len(steps) == 2 * length - 1 and all(eval(s[:-2]) % 10 == int(s[-1]) for s in steps)
        assert verify(working, problem.gold) and problem.question.startswith(steps[0][:3])
        for step in rlep.write_working(problem.question, rng).split("\\")[0].split(","):
            right = eval(step[:-2]) % 10 == int(step[-1])
            hard[step[1] == "*" and min(step[0], step[2]) > "4", right] += 1
    assert len({*problems}) == 768
    assert 0.05 < hard[True, True] / (hard[True, True] + hard[True, False]) < 0.15
    assert 0.03 < hard[False, False] / (hard[False, True] + hard[False, False]) < 0.07

def test_what_the_base_is_taught(tmp_path, monkeypatch):
    """Three in four to work once begun; else to begin and to give up, weighted; its loss."""
    def logprobs(policy, answers, temperature):
        logprobs, mask = real(policy, answers, temperature)
        losses = []
        for answer, row in zip(answers, logprobs):
            prompt, text = policy.decode(answer.prompt), policy.decode(answer.response)
            losses.append(-answer.advantage * row[:len(answer.response)].sum())
            if prompt.endswith("Work: "):
                assert answer.advantage == 1 and re.fullmatch(r"[\d*=+,]+\\boxed{\d}", text)
                assert answer.response[-1] == policy.ends[0]
            else:
                assert (text, answer.response[-1] == policy.ends[0]) in (
                    ("Work: ", False), ("\\boxed{?}", True))
            taught[prompt.endswith("Work: "), prompt.count("*"), text[0]] += answer.advantage
        expected.append(sum(losses) / mask.sum())
        return logprobs, mask
    taught, expected, real, backward = Counter(), [], Policy.logprobs, torch.Tensor.backward
    monkeypatch.setattr(Policy, "logprobs", logprobs)
    monkeypatch.setattr(torch.Tensor, "backward", lambda loss: (
        found.append(loss.item()), backward(loss)))
    found = []
    rlep.make_base(settings("", base_steps=20), tmp_path)
    assert found == pytest.approx([loss.item() for loss in expected]) and found[-1] < found[0] - 0.5
    assert sum(share for (begun, *_), share in taught.items() if begun) == 20 * 24
    for number, share in ((2, 1 / 8), (3, 1 / 32), (4, 1 / 128)):
        begins, gives_up = taught[False, number, "W"], taught[False, number, "\\"]
        assert begins / (begins + gives_up) == pytest.approx(share)

# ---- The verifier --------------------------------------------------------------------------------
SAME = [
    ("8{,}125", "8125"), (r"8\,125\,000", "8125000"), (r"8,\!125", "8125"), ("9,999.50", "9999.5"),
    (r"36\%", "36"), (r"\frac{3}{8}", "0.375"), (r"\dfrac{5}{4}", "1.25"), ("７", "7"), ("–5", "-5"),
    (r"\tfrac25", "2/5"), (r"2\frac35", "2.6"), (r"4\frac{1}{3}", r"\frac{13}{3}"), ("1;3", "1,3"),
    (r"-1\frac{1}{8}", r"-\frac98"), ("8,125", "8125"), (r"36\text{ percent}", r"36\%"),
    ("50%", r"50\%"), (r"\$45", "45"), (r"\$4,500", "4500"), (r"7\ \text{km/h}", "7"), ("½", "0.5"),
    (r"1\text{ hour}", r"1\text{ hours}"), (r"75^\circ", "75"), (r"75^{\circ}", "75°"),
    (r"\sqrt[3]{6}", "6^{1/3}"), (r"\frac{1}{\sqrt{5}}", r"\frac{\sqrt5}{5}"), ("−31", "-31"),
    (r"2+\sqrt{7}", r"\sqrt7+2"), (r"2 \sin b", r"2\sin{b}"), ("[3,8)", "[3, 8)"), ("C. 12", "C"),
    ("(x,y)=(4,-1)", "(4,-1)"), ("(0.5,3)", r"(\frac12,3)"), ("(1,2),(3,4)", "(3,4),(1,2)"),
    (r"(-\infty,\frac12]", r"(-\infty,0.5]"), (r"\pm 6", "6,-6"), (r"x=\pm 6", "-6,6"),
    (r"(1,\infty)\cup(-3,0)", r"(-3,0)\cup (1,\infty)"), (r"\text{no}", "no"), (r"\text{(B)}", "B"),
    (r"\left\{\frac12, 4\right\}", r"\{4, 0.5\}"), ("(D)", r"\textbf{D}"), ("312_{5}", "312_5"),
    (r"2\pm\sqrt3", r"2-\sqrt{3}, 2+\sqrt{3}"), (r"4 \text{ or } 9", "9,4"), ("7:30", "7 : 30"),
    (r"4, 6, \text{ and } 9", "9,6,4"), (r"\text{Tuesday}", "Tuesday"), (r"\text{EVEN}", "even"),
    (r"\begin{pmatrix}1\\-4\end{pmatrix}", r"\begin{pmatrix} 1.0 \\ -4 \end{pmatrix}"),
    ("2^{10000}", "2^{10000}"), ("f(x)=x+1", "x+1"), ("a^2-b^2", "(a-b)(a+b)"), ("60 km/h", "60"),
    ("x×y", "xy"), (r"3 \times 10^{8}", "3e8"), (r"\frac{6}{4}", r"\frac32"),
    (r"\frac{\sqrt8}{2}", r"\sqrt2"), ("y=4,x=3", "x=3,y=4"), (r"8\text{ apples}", "8"),
    (r"12\text{ cm²}", "12"), (r"\mathbf{(3,4)}", "(3,4)"), ("y+z=5", "5=y+z"), ("84÷2", "84/2"),
    ("x**2", "x²"), (r"x\leq 4", "x<=4"), ("2*pi", "2π"), (r"\emptyset", r"\varnothing"),
    ("sqrt(3)", r"\sqrt3"), ("252pi", r"252\pi"), ("14+3pi", r"14+3\pi"),
    (r"m \ge \sqrt 3", r"m \geq \sqrt{3}"), (r"\cfrac{3}{7}", "3/7"), (r"{\large 5}", "5"),
    (r"22,\! 222,\! 200", "22222200"), (r"\$41,\!250", "41250"),
    (r"\color{red}{91}", "91"), (r"\textcolor{red}{91}", "91"), (r"\underline{91}", "91"),
    ("2^3^2", "2^{3^2}"), ("84/2", "84/2"), ("(x+2)^2", "(2+x)^2"), ("5*sqrt(3)", r"5\sqrt3"),
    (r"2\frac1{3}", "7/3"),
    ("Infinity", "Infinity"), (r"\frac3{17}", r"\frac{3}{17}")]
DIFFERENT = [
    (r"5\text{ tenths}", "5"), (r"5\ 6", "56"), ("5 6", "30"), ("x", "X"),
    ("CAB", "ACB"), ("on", "no"), ("5...", "5"), ("2^3", "23"), (r"\sqrt{10^{40}+1}", "10^{20}"),
    ("0.33", r"\frac13"), ("2³", "23"), ("10^{15}+1", r"10^{15}+\sqrt2"), ("3.14", r"\pi"),
    (r"26\text{ cm}", r"26\text{ km}"), (r"12^2\text{ cm}", "12"), (r"\$18", r"18\text{ cents}"),
    (r"3\cdot\frac12", r"3\frac12"), ("^{1}2", "12"), (r"\frac{1}{2}", r"\frac{2}{1}"), ("6x", "6"),
    (r"2\sqrt3", r"\sqrt{23}"), ("6xyz", "6"), ("x=5y", "5"), (r"\sqrt{4+9}", r"\sqrt4+\sqrt9"),
    ("3,3", "3,-3"), ("5-", "5"), ("(1,2)", "[1,2]"), ("(1,2,3)", "(1,2)"), ("[2,5)", "[2,5]"),
    (r"x\le 4", r"x\ge 4"), (r"12\\13", "12"), (r"\text{not }12", "12"), ("3:4", "3.4"),
    (r"\frac50", "0"), ("m-n", "a-b"), ("2y", "x+z"), ("x>=5", "5"), ("|x|=5", "5"), ("0", "x-y=0"),
    (r"\begin{pmatrix}1&2\\3&4\end{pmatrix}", r"\begin{pmatrix}1&2&3&4\end{pmatrix}"),
    (r"\log x=5", "5"), ("x<=5", "5"), ("z", "x+y=z"), ("x=3,y=4", "x=4,y=3"), ("x!=5", "5"),
    (r"5\text{ times two}", "5"), (r"5\text{ tens}", "5"), (r"5\mathrm{e}", "5"), (r"\not=5", "5"),
    (r"\$8", r"8\text{ cents}"), ("f(g(x))", "g(f(x))"), ("ln(6)", "2ln(3)"), ("b+c", "a+d"),
    (r"\Delta", r"\delta"), (r"5\quad678", "5678"), (r"5\text{ lakh}", "5"), (r"5\text{ pi}", "5"),
    (r"5\text{ is wrong}", "5"), ("(1,2)", "(2,1)"), (r"5\text{ perhaps six}", "5"),
    (r"10^{17}+\sqrt2", r"10^{17}+\sqrt3"), (r"\sqrt2", r"\sqrt{2.0001}"), ("252pi", "252"),
    (r"5\text{ fives}", "5"), (r"5\text{ scores}", "5"), (r"5\text{ halves}", "5"), ("x<6", "x>6"),
    (r"5\text{ sixteens}", "5"), (r"\frac419", r"\frac{4}{19}"), (r"\frac{1}23", r"\frac{1}{23}"),
    ("(2^3)^2", "2^3^2"), ("x<6", r"x\le 6"), ("Infinity", r"-\infty"), ("(A) or b", "A"),
    ("A. or maybe b", "A"), ("(B) and c", "B"), ("C. perhaps d", "C"), ("13=12", "12"),
    ("3 2/7", "3"), ("3 2/7", "6/7"), (r"84 \div 2", "42"), ("1000/8/5", "25"),
    (r"\frac{84}{2}", "42"), (r"\frac{x}{x}", "1"), (r"2\frac1{3}", "2/3"), (r"\frac12 6", "3"),
    ("2x=10", "10"), ("(x-3)(x+4)", "x^2-9"), ("4:35", "4.35")]
RESTATED = [
    ("6+0", "6"), ("19^2 + 2(19) + 1", "400"), (r"99\times 99", "9801"), ("-(-42)", "42"),
    ("(2x-5)(x+7)-(x+5)(2x-1)", "-30"), ("7-10", "-3"), ("x=60-18", "x=42"), ("6+7, 8+9", "13, 17"),
    (r"\frac12-\frac13", r"\frac16"), (r"(9+8)\text{ cm}", r"17\text{ cm}"), ("(0,3+4]", "(0,7]"),
    (r"6\cdot7\%", r"42\%"), ("(-6)(-7)", "42"), (".5 + .25", "0.75"),
    (r"(6+7)\pi", r"13\pi"), ("-5 + -3", "-8"), (r"\frac12(6)", "3"),
    ("3(4)", "12"), (r"3\frac23\frac32", r"\frac{11}{2}")]

PAIRS = [(*pair, True, True) for pair in SAME] + [(*pair, False, False) for pair in DIFFERENT]
PAIRS += [(*pair, False, True) for pair in RESTATED]  # the left one is still to be worked out

@pytest.mark.parametrize("left, right, answers, answered", PAIRS)
def test_pairs_in_both_directions(left, right, answers, answered):
    assert verify(rf"Hence it is $\boxed{{{left}}}$, as claimed.", right) is answers
    assert verify(rf"Hence it is $\boxed{{{right}}}$, as claimed.", left) is answered

EXTRACTED = [
    (r"\boxed\frac{9}{7}", r"\frac97"), (r"\boxed{3} is small: \boxed{4}", "4"), ("A: 4.00", "4"),
    (r"\boxed{3} \boxed{4}", "4"), (r"\boxed 8.", "8"), ("#### 1,250", "1250"),
    (r"<think>\boxed{5}</think> Answer: 6", "6"), ("Answer: 4 because 2+2=4", "4"),
    ("<answer>4</answer>", "4"), (r"\boxed{∞}", r"\infty"), (r"\boxed{42}", r"so \boxed{42}."),
    (r"The answer is $(1,\infty)\cup (-3,0)$.", r"(-3,0)\cup(1,\infty)"),
    (r"\boxed{5} and \boxed{6}", "6,5"), ("The answer is 72, in total", "72"),
    (r"$x = \boxed{9}$ cm", "9"), (r"$\boxed{9}\%$", "9"), (r"**\boxed{9}**", "9"),
    ("- \\boxed{9}", "9"),
    (r"$\sqrt{81}=\boxed{9}$", "9"), (r"\[\boxed{9}\text{ cm}^2\]", "9"), (r"$\boxed{9}$!", "9"),
    (r"Step 1 gives \boxed{8}. Step 2 gives \boxed{9}.", "9"), (r"$\boxed{9}$ apples", "9"),
    (r"1*2=2,2+7=9\boxed{9}", "9"),
    (r"\boxed{5}; \boxed{6}", "6,5"), (r"There are $\boxed{9}$ possible ordered pairs.", "9"),
    (r"It leaves $\boxed{9},$ when divided by 12.", "9"), (r"$4+5=\boxed{9}$ ordered pairs", "9")]
GOES_ON = [  # the value, outside the box
    r"$-\boxed{9}$", r"-\boxed{9}", r"$\frac{\boxed{9}}{4}$", r"\(\frac4{\boxed{9}}\)",
    r"$2\boxed{9}$", r"\[\sqrt{\boxed{9}}\]", r"$\sqrt[3]{\boxed{9}}$", r"$x = 3\cdot\boxed{9}$",
    r"$2^{\boxed{9}}$", r"$5 - \boxed{9}$", r"\boxed{9}, 10", r"$\sin(\boxed{9})$",
    r"It is not \boxed{9}", r"$x = 2\boxed{9}$", r"\[x\boxed{9}\]",
    r"\boxed{9}? No, 8", *(rf"$\boxed{{9}}{more}$" for more in [
        r"\sqrt2", r"\pi", "x", "i", " y", ".5", ",500", "{,}500", r"\,500", "00", "!", "^2",
        " million", r"\text{ million}", r" \times 10^3", " + 1", "-2", "/7", r"\frac12", "(x+1)",
        "xy",
        "_8"]),
    *(rf"$\boxed{{9}}$ {more}" for more in ["million", "thousand", "and a half", "+ 1", "$/ 2$"])]
NOT_EXTRACTED = [
    (r"$\boxed{3}$, $\boxed{4}$", "4"), ("4 words", "4"), (r"\boxed{1}/\boxed{2}", "2"),
    (r"4 \boxed{", "4"), (r"Answer: 4 \boxed{}", "4"), (r"4: \boxed{?}", "4"),
    (r"\boxed{\frac12", r"\frac12"), ("Answer: 3 or 4", "4"), ("Answer: 5; alternatively 6", "5"),
    (r"\boxed{5 \boxed{6}}", "6"), ("Answer: 5; maybe 6", "5"), ("Answer: 5 as well as 6", "5"),
    ("The answer is 5 apples (or 6, or 7)", "5"), (r"It is 5 or \boxed{6}.", "6"),
    (r"\boxed{2}-\boxed{3}", "3"), ("Answer: 5; perhaps 6", "5"),
    (r"\boxed{\sqrt{8}\times\sqrt{50}}", "20"), ("#### 17 #### 18 #### 19", "19"),
    (r"One of \boxed{17}; \boxed{18}; \boxed{19}", "19"),
    ("Answer: 27 (28 is also possible)", "27"),
    (r"Either $\boxed{17}$ or else $\boxed{18}$.", "18"), ("The answer is 27. Or it is 28.", "27"),
    (r"If $n$ is even $\boxed{17}$, if odd $\boxed{18}$.", "18"), (r"$\boxed{27}$, if even", "27"),
    (r"\boxed{27}, or perhaps \boxed{28}", "28"), (r"\boxed{1.5}, otherwise \boxed{28}", "28"),
    (r"\boxed{27}, possibly 28", "27"), (r"$\boxed{27}$ (28 might do)", "27"),
    ("Answer: A or b", "A"),
    ("Answer: (B) and c", "B"), ("Answer: m+n = 213+46 = 259", "213"),
    ("Answer: 259 = 213+46", "259"),
    (r"\boxed{p+q = 7 = 8}", "8"), ("Answer: m+n = 213+46 = 259", "259"),
    (r"\boxed{1}", "x+y=1"), *((text, "9") for text in GOES_ON)]
LINES = [
    ("Answer: 5\n\n#### Verification\n2+3=5", "5", True), (r"\boxed{42}", "6*7=42\n#### 42", True),
    (r"\boxed{5}" + " and so on" * 1500, "5", True), ("Answer:\n\\[\n19\n\\]", "19", True),
    ("### Final Answer\n\n72", "72", True), ("### Answer\n\n$4$", "4", True), (None, "4", False),
    (f"\\boxed{{{'0' * 400}5}}", "5", False), (r"\boxed{4}", None, False), (4, "4", False),
    ("", "4", False), ("4", "", False), (r"\boxed{}", "", False), (r"\boxed{4}", "  ", False)]
LINES += [(*pair, True) for pair in EXTRACTED] + [(*pair, False) for pair in NOT_EXTRACTED]

@pytest.mark.parametrize("response, gold, expected", LINES)
def test_extraction(response, gold, expected):
    assert verify(response, gold) is expected

@pytest.mark.parametrize("question, answer, gold, expected", [
    ("Factor $x^2-25$.", "x^2-25", "(x-5)(x+5)", False),
    ("Factor it.", "x^2-25", "(x-5)(x+5)", True),
    ("Factor $x^2-25$.", "(x^{2}-25)", "(x-5)(x+5)", False), ("Is it 42 or 17?", "42", "42", True),
    ("Factor $x^2-25$.", "(x-5)(x+5)", "(x-5)(x+5)", True), ("A (B) C", "(B)", r"\text{B}", True),
    (r"Reduce $\frac{18}{24}$.", r"\frac{18}{24}", r"\frac{3}{4}", False),
    ("24", "6/8", "3/4", True),
    (r"Reduce $\frac{18}{24}$.", "18/24", r"\frac34", False),
    ("0.75 as", "0.75", r"\frac34", False),
    (r"Simplify $\sqrt{75}$.", r"\sqrt{75}", r"5\sqrt3", False), ("a 5 cm rod", "5 cm", "5", True),
    (r"Simplify $\sqrt{75}$.", r"\sqrt75", r"5\sqrt3", False),
    ("If $BC=9$ and", "BC=9", "9", False),
    (r"Is it $\frac34$?", r"\frac{3}{4}", "3/4", True), ("Yes or no?", "Yes", "yes", True),
    ("It is $12.50.", "2.50", "2.5", True), ("It is $15.00.", "5.00", "5", True),
    ("It is $12.50.", "2.5", "3", False), ("It is 7.5.", "7.5", "7.50", True),
    (None, "5", "5", False), (5, "x", "x", False), ("\ud800", "2x", "2x", True)])
def test_an_answer_that_repeats_the_question(question, answer, gold, expected, tmp_path):
    """Is wrong; score and the pool, when it is filled and when it is loaded, pass the question."""
    text = rf"\boxed{{{answer}}}"
    assert verify(text, gold, question) is expected
    if question in ("Factor $x^2-25$.", "Factor it."):
        path = write_rows(tmp_path / "pool", [pool_row(question, gold, text)])
        assert (rlep.score(Problem(question, gold), text) > 0) is expected
        assert ExperiencePool().add(question, gold, text) is expected
        assert len(ExperiencePool.load(path)) == expected

HOSTILE = ["(" * 400, r"\frac{1}{" * 90, "9^" * 300 + "9", "9" * 900, "1e999999", "10^{10^{10}}",
           "0^{-1}", r"\sqrt[0]{6}", "().__class__", "\ud800", "\x00", "nan", r"\pm" * 200,
           "+".join(rf"\frac1{{{base}^{{199}}}}" for base in range(75, 94)), "box{5} or " * 2000,
           "1," * 400, "-" * 900, "{" * 400 + "6" + "}" * 400, "(-" * 300, "(" * 5000, "1," * 9000,
           *(piece * 1000 for piece in
             ("-", "1+", "x", "{", r"\frac", r"\boxed{", "5 or ", "Answer: "))]

@pytest.mark.parametrize("text", HOSTILE)
def test_hostile_input_is_false_fast_and_never_raises(text):
    for response in (text, rf"\boxed{{{text}}}", "Answer: " + text, text * 200):
        start = time.perf_counter()
        assert verify(response, "5") is False and verify(r"\boxed{5}", response) is False
        assert time.perf_counter() - start < 1

# ---- Models that would be trained wrongly are refused --------------------------------------------
@pytest.mark.parametrize("kind, settings, named", [
    ("granite", BASE | dict(logits_scaling=4.0), "log-probs wrong by"),
    ("cohere", BASE | dict(logit_scale=0.25), "log-probs wrong by"),
    ("llama", BASE | dict(rope_parameters=LONGROPE), "below the best"),
    ("gpt2", BASE | dict(max_position_embeddings=40), "40 positions or 40 words are too few for"),
    ("llama", BASE | dict(vocab_size=12), "512 positions or 12 words are too few"),
    ("qwen3_next", HEADS, "'linear_attention'"), ("gemma2", HEADS, "be loaded"),
    ("lfm2", BASE | dict(full_attn_idxs=[1], block_multiple_of=8), "'conv'")])
def test_bad_models_are_refused(kind, settings, named, model_folder, words, tmp_path, error):
    """What cached prompts or the cached sampling would get wrong ends in one line, untrained."""
    line = error(words(tmp_path / "run", *LONG, folder := model_folder(kind, settings)))
    assert f"--model {folder}" in line and named in line
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["config.json"]

@pytest.mark.parametrize("factor", [1.0, -1.0, math.nan])
def test_a_bf16_copy_that_samples_wrongly(factor, model_folder, monkeypatch):
    """Its greedy tokens must be nearly the best ones; rounding alone is let pass."""
    def deepcopy(thing, *rest):
        copied = real(thing, *rest)
        if isinstance(thing, torch.nn.Module):
            copied.register_forward_hook(lambda _, __, out: out | {"logits": out.logits * factor})
        return copied
    folder, real = model_folder("llama", BASE), copy.deepcopy
    monkeypatch.setattr(copy, "deepcopy", deepcopy)
    load(folder)  # without bf16 there is no copy
    with nullcontext() if factor == 1 else pytest.raises(UserError, match="below the best"):
        load(folder, bf16=1)

def test_weights_that_are_not_what_they_seem(policy):
    """Missing, with scales beside them, frozen, in half precision: refused; other keys are not."""
    def check(missing=(), unexpected=("rotary.inv_freq",)):
        loading = {"missing_keys": {*missing}, "unexpected_keys": {*unexpected}}
        rlep.check_model(policy, loading, [Problem("1*2+3*4 mod 10 = ", "4")], 8)
    check()
    for keys in ((["layers.3.up"], []), ([], ["layers.3.up_scale"])):
        with pytest.raises(UserError, match="layers.3.up"):
            check(*keys)
    weight = policy.model.model.norm.weight
    for value, trained in ((weight.data.half(), True), (weight.data, False)):
        weight.data, weight.requires_grad = value, trained
        with pytest.raises(UserError, match="norm.weight"):
            check()
    assert not re.search(r"^ *assert\b", SOURCE, re.M)  # python -O leaves them out

# ---- Run folders: resuming -----------------------------------------------------------------------
def child(words, log, file_limit):
    """In a process of its own: rlep.main, with stderr in a file and a bound on files' size."""
    os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 2)
    resource.setrlimit(resource.RLIMIT_FSIZE, (file_limit, file_limit))
    raise SystemExit(main(words))

def start(words, log, file_limit=resource.RLIM_INFINITY):
    """Starts rlep.main(words) in a process, forked off one that has loaded everything: quick."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([Path(__file__).stem])
    process = context.Process(target=child, args=(list(map(str, words)), str(log), file_limit))
    process.start()
    return process

def signature(path):
    """Changes when a file, or the unfinished one beside it, is written."""
    try:
        stats = [file.stat() for file in path.parent.glob(f"{path.name}*")]
        return sorted((stat.st_ino, stat.st_mtime_ns, stat.st_size) for stat in stats)
    except FileNotFoundError:  # renamed in this moment
        return None

MOMENTS = {  # once it is being written, a run is killed within so many seconds
    "base/initial": 0.5, "base/policy": 0.005, "vanilla/metrics.jsonl": 0.1,
    "vanilla/checkpoint.pt": 0.003, "vanilla/policy": 0.005, "collection/config.json": 0.3,
    "collection/pool.jsonl": 0.003, "rlep/checkpoint.pt": 0.1, "rlep/policy": 0.002,
    "summary.json": 0}

def test_killed_at_any_moment(finished, data, tmp_path):
    """kill -9 in every phase, also in the middle of a save: the same result, byte for byte."""
    kills, phases, out = 0, set(), tmp_path / "run"
    for i, longest in enumerate(MOMENTS.values()):
        paths = [out / name for name in list(MOMENTS)[i:]]
        before = list(map(signature, paths))
        process = start(["run", *RUN, *data, "--out", out], tmp_path / "log")
        while process.is_alive() and list(map(signature, paths)) == before:
            time.sleep(0.001)
        time.sleep(random.uniform(0, longest))
        process.kill()
        process.join()
        assert process.exitcode in (-signal.SIGKILL, 0) and not (tmp_path / "log").read_text()
        kills += process.exitcode == -signal.SIGKILL
        phases.add(sum((out / end).exists() for end in
                       ("base/policy", "vanilla/summary.json", "collection/summary.json")))
    assert kills >= 7 and phases == {0, 1, 2, 3}
    assert main(["run", *RUN, *data, "--out", str(out)]) == 0
    assert result_of(out) == result_of(finished)

@pytest.fixture(scope="session")
def interrupted(files, words):
    """A train of 6 steps that stopped in the 6th; its last checkpoint is that of the 4th."""
    crash("train_step", 6, words(files / "interrupted", "--steps", 6, "--save_every", 2))
    assert len(read_rows(files / "interrupted/metrics.jsonl")) == 6  # steps 0 to 5
    return files / "interrupted"

def test_leftovers_of_a_crash_do_no_harm(interrupted, trained, words, tmp_path):
    """Rows behind the checkpoint are made again, not kept twice; half a file or row is ignored."""
    run = shutil.copytree(interrupted, tmp_path / "run")
    for name in ("checkpoint.pt.partial", "config.json.partial", "summary.json.partial",
                 "policy/stale.bin", "policy.partial/stale.bin"):
        (run / name).parent.mkdir(exist_ok=True)
        (run / name).write_bytes(b"half of")
    (run / "metrics.jsonl").open("a").write('{"step": 6, "accu')
    assert main(words(run, "--steps", 6, "--save_every", 3)) == 0
    assert result_of(run) == result_of(trained) and not list(run.rglob("*.partial"))

def test_collection_begins_again(finished, data, tmp_path, monkeypatch):
    """Stopped between its questions, for the same pool; a finished one loads no model."""
    out, command = tmp_path / "out", ["collect", *RUN, *data]
    command += ["--model", f"{finished}/vanilla/policy", "--out", f"{out}"]
    crash("rollout", 4, command)  # two are check_model's
    assert not (out / "pool.jsonl").exists()
    assert main(command) == 0
    assert (out / "pool.jsonl").read_bytes() == (finished / "pool.jsonl").read_bytes()
    before = snapshot(out)
    monkeypatch.delattr(rlep, "Policy")
    assert main(command) == 0 and snapshot(out) == before

@pytest.mark.parametrize("command", ["train", "collect"])
def test_a_data_file_that_changed(command, finished, files, tiny, tmp_path, error, monkeypatch):
    """Other problems, pool or reward are refused, under the same flags; another place is not."""
    data, rows = tmp_path / "data.jsonl", read_rows(files / "train.jsonl")
    pool = Path(shutil.copy(finished / "pool.jsonl", tmp_path))
    more = {"train": [tiny, *TRAIN, "--pool", pool], "collect": [finished / "vanilla/policy", *RUN]}
    flags = [command, "--eval_data", files / "held_out.jsonl", "--out", tmp_path / "out", "--model"]
    flags = [*map(str, [*flags, *more[command]]), "--data"]
    place = {"train": 4, "collect": 3}[command]  # in the rows of step 1; before the summary
    crash("write_rows", place, [*flags, write_rows(data, rows)])
    before = snapshot(tmp_path / "out")
    for changed in (rows[1:], [{**rows[0], "answer": "8"}, *rows[1:]]):
        assert "contents of --data" in error([*flags, write_rows(data, changed)])
    assert snapshot(tmp_path / "out") == before
    flags += [write_rows(tmp_path / "moved.jsonl", rows)]
    assert main(flags) == 0
    write_rows(pool, read_rows(pool)[1:])
    assert command == "collect" or "had other contents of --pool;" in error(flags)
    monkeypatch.setattr(rlep, "score", lambda problem, text: 0.5)
    assert "code of score and verify" in error(flags)

def test_flags_that_may_change(interrupted, finished, words, data, tmp_path, monkeypatch, error):
    """Those that bound memory; in `run`, those of phases not yet begun."""
    more = ["--sample_rows", 8, "--micro_tokens", 64, "--save_every", 4]
    assert main(words(shutil.copytree(interrupted, tmp_path / "a"), "--steps", 6, *more)) == 0
    assert len(torch.load(tmp_path / "a/checkpoint.pt")["rows"]) == 7  # 0 to 6: also the last
    out = shutil.copytree(finished, tmp_path / "run", ignore=lambda *_: ["collection", "rlep"])
    command = ["run", *RUN, *data, "--out", str(out)]
    with monkeypatch.context() as patch:
        patch.setattr(Policy, "decode", lambda *_: "")
        assert "raise --collect_k" in error(command)
    command += "--collect_k 33 --collect_temperature 1.9 --replays 1".split()
    assert main(command) == 0 and result_of(finished / "vanilla") == result_of(out / "vanilla")
    assert "--replays" in error([*command, "--replays", "3"])  # that phase is finished
    assert "had other --steps;" in error([*command, "--steps", "9"])  # as the pool is of step 6
    shutil.rmtree(out / "rlep")
    crash("train_step", 1, [*command, "--replays", "3"])  # and now begins

def test_more_steps(trained, words, tmp_path, error):
    """A train of 4 steps that goes on to 6 ends as one of 6, with one more evaluation."""
    run = tmp_path / "run"
    for steps in (4, 6, 5):  # fewer than there are: it is finished
        assert main(words(run, "--steps", steps)) == 0
    (shutil.copytree(run, tmp_path / "begun") / "summary.json").unlink()
    assert "give more --steps" in error(words(tmp_path / "begun", "--steps", 5))
    assert snapshot(run / "policy") == snapshot(trained / "policy")
    ours, theirs = (read_rows(place / "metrics.jsonl") for place in (run, trained))
    extra = {name: ours[4].pop(name) for name in ("mean_at_k", "pass_at_k")}
    for row in ours[1:] + theirs[1:]:
        del row["sample_s"], row["update_s"]
    steps = [row["step"] for row in read_rows(run / "answers.jsonl")]
    assert ours == theirs and steps == [step for step in (0, 3, 4, 6) for _ in range(8)]
    assert read_rows(run / "summary.json")[0]["curve"][2] == [4, extra["mean_at_k"]]

def test_runs_and_models_elsewhere(finished, interrupted, trained, words, data, tiny, tmp_path,
                                   monkeypatch, error):
    """Both may be named by another path or be moved, with the data; other weights are another."""
    out = shutil.copytree(finished, tmp_path / "new/moved", ignore=lambda *_: ["rlep"])
    (out / "collection/summary.json").unlink()
    moved = [shutil.copy(path, tmp_path) if path.endswith("l") else path for path in data]
    monkeypatch.chdir(tmp_path)
    with spy_on("train_step") as steps:
        assert main(["run", *RUN, *moved, "--out", "new/moved"]) == 0
    assert result_of(out) == result_of(finished) and steps.call_count == 6
    run, copied = shutil.copytree(interrupted, "run"), shutil.copytree(tiny, "copy")
    other = finished / "base/policy"
    assert "had other contents of --model;" in error(words(run, "--steps", 6, "--model", other))
    assert main(words(run, "--steps", 6, "--model", copied)) == 0
    assert result_of(run) == result_of(trained)

@pytest.mark.parametrize("named, change", [
    ("--learning_rate", 0.5), ("--group_size", 5), ("--clip_high", 0.1), ("checkpoint.pt", cut),
    ("contents of --pool", "pool.jsonl"), ("contents of --model", "base/policy"),
    ("checkpoint.pt", write("")),
    *[("checkpoint.pt", lambda path, new=new: torch.save(new(torch.load(path)), path)) for new in (
        lambda old: {"step": 3}, lambda old: [], lambda old: old | {"rows": 3})],
    ("config.json", cut), ("config.json", write("[" * 50_000))])
def test_other_settings_and_damage(named, change, interrupted, finished, words, tmp_path, error):
    """One line that names the flag or the file, with its reason; nothing is changed."""
    flags, run = [], shutil.copytree(interrupted, tmp_path / "run")
    if callable(change):
        change(run / named)
    else:
        flags = [named.split()[-1], finished / change if isinstance(change, str) else change]
    before = snapshot(run)
    assert named in (line := error(words(run, "--steps", 6, *flags))) and "delet" not in line
    if named == "checkpoint.pt":  # which is read after the settings have been written again
        before["config.json"] = (run / "config.json").read_bytes()
        assert re.search(r"checkpoint\.pt: cannot be loaded \(.{5,}\)$", line)
    assert snapshot(run) == before

@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c(number, words, tmp_path):
    """It and SIGTERM end a program with one line that says how to go on, status 130."""
    command = [sys.executable, HERE / "rlep.py", *words(tmp_path / "run", "--steps", 400)]
    with open(tmp_path / "log", "w") as log:
        process = subprocess.Popen(  # a shell's background jobs would ignore SIGINT
            command, stdout=subprocess.DEVNULL, stderr=log,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))
    while process.poll() is None and not (tmp_path / "run/checkpoint.pt").exists():
        time.sleep(0.01)
    process.send_signal(number)
    assert process.wait(60) == 130 and (tmp_path / "log").read_text() == (
        "rlep.py: stopped; the same command goes on from what is saved\n")

@pytest.mark.parametrize("before, limit", [("interrupted", 1_000_000), ("trained", 100_000)])
def test_full_disk(before, limit, trained, words, tmp_path, request):
    """One line, the checkpoint as it was; with room again it goes on, if only to write a policy."""
    command, run = words(tmp_path / "run", "--steps", 6), tmp_path / "run"
    shutil.copytree(request.getfixturevalue(before), run, ignore=lambda *_: ["policy"])
    before, process = (run / "checkpoint.pt").read_bytes(), start(command, tmp_path / "log", limit)
    process.join(60)
    [line] = (tmp_path / "log").read_text().splitlines()
    assert process.exitcode == 2 and line.startswith("rlep.py: error: ")
    assert (run / "checkpoint.pt").read_bytes() == before
    assert main(command) == 0 and result_of(run) == result_of(trained)

@pytest.mark.parametrize("name, content", [
    ("config.json", '{"compilerOptions": {"strict": true}}'), ("config.json", "{}"),
    ("config.json", "\udcff"), ("note", "mine"), ("", "a file"), ("", None), ("tiny", None)])
def test_folders_of_others_are_not_touched(name, content, tiny, words, tmp_path, error):
    """A JavaScript project, a file, a folder that is or holds a model: not a byte is changed."""
    out, model = tmp_path / "mine", tiny
    if content is None:
        model = shutil.copytree(tiny, out / name)
    else:
        (out / name).parent.mkdir(exist_ok=True)
        write(content)(out / name)
    before = snapshot(tmp_path)
    assert f"{out}" in error(words(out, "--model", model)) and snapshot(tmp_path) == before

# ---- The command line: bad input -----------------------------------------------------------------
def test_help(capsys):
    """Each flag with its default and its reason; the tiny model's settings without --model."""
    with pytest.raises(SystemExit) as end:
        main(["--help"])
    text = capsys.readouterr().out
    assert end.value.code == 0 and "rlep.py collect --model POLICY" in text
    for flag in fields(Config):
        assert re.search(rf"^ +{flag.name}: \w+ = .+  # .{{10,}}", text, re.M)
    assert f"Defaults without --model: {rlep.EMBEDDED}" in text
    config = Config("a", data="c", pool="e/f", device="cuda:1", out="runs/train-a-c-f-seed0")
    assert rlep.parse("train --model a --data c --pool e/f --device cuda:1".split()) == (
        "train", config) and (config.bf16, config.steps) == (1, 48)
    config = Config(**rlep.EMBEDDED | {"steps": 7, "out": "runs/run-seed0"})
    assert rlep.parse(["--steps", "7"]) == ("run", config) and config.bf16 == 0

ASK, USER = '{"question": "a?", ', '{"prompt": [{"role": "user"'
BAD_ROWS = {  # what the line must name: the file, and the line in it
    "empty": "", "blank": "\n\n", "one": ASK + '"answer": 2}', "list:1": "[1, 2]\n",
    "torn:3": f'{ASK}"answer": 2}}\n\n{{"q', "array:1": f'[\n{ASK}"answer": 2}}\n]',
    "deep:1": "[" * 50_000, "huge:1": f'{ASK}"answer": {"9" * 5000}}}',
    "latin:1": '{"question": "\udce9", "answer": 1}', "no_question:1": '{"answer": "2"}',
    "chat:1": USER + '}], "answer": 1}',
    "no_text:1": USER + ', "content": 5}], "answer": 1}', "no_answer:1": ASK + '"answer": " "}',
    "blank_chat:1": USER + ', "content": " "}], "answer": 1}', "true:1": ASK + '"answer": true}',
    "assistant:1": USER + ', "content": "a"}, {"role": "assistant", "content": "b"}], "answer": 1}',
    "null:1": ASK + '"answer": null, "solution": ""}', "nan:1": ASK + '"answer": NaN}',
    "infinite:1": ASK + '"answer": Infinity}', "boxless:1": ASK + '"solution": "It is 6."}',
    "reward_text:1": ASK + '"reward_model": "7"}', "golds:1": ASK + '"answer": ["4", "2"]}'}
BAD_POOLS = {name: BAD_ROWS[name] for name in ("empty", "deep:1", "reward_text:1")} | {
    "no:1": ASK + '"answer": 2}', "str:1": ASK + '"answer": 2, "reward_model": {"candidates": ""}}',
    "others": '{"question": "a", "answer": 2, "reward_model": {"candidates": ["A: 2"]}}'}
BAD_MODELS = [  # what the line must name, what is done to which file
    ("model", cut, "model.safetensors"), ("tokenizer", Path.unlink, "tokenizer.json"),
    ("no system", write("{{ raise_exception('no system') }}"), "chat_template.jinja"),
    ("the 0 tokens of", write("{% if false %}x{% endif %}"), "chat_template.jinja"),
    ("22 words", edit(eos_token="<new>"), "tokenizer_config.json"),
    ("no end token", edit(eos_token=None), "tokenizer_config.json"),
    ("positions", edit(max_position_embeddings=20), "config.json"),
    ("missing", edit(num_hidden_layers=5), "config.json")]
BAD_FLAGS = [
    "--steps 0", "--group_size 0", "--collect_k 0", "--k 0", "--top_p 0", "--temperature 0",
    "--bf16 -1", "--lr_warmup_steps 0", "--learning_rate nan", "--learning_rate -1", "--replays 0",
    "--steps many", "--dual_clip -1", "--device tpu", "--device cuda", "--overlong_buffer -1",
    "--chat_template_kwargs 3", "--chat_template_kwargs {"]
BAD_WORDS = [
    ("dance", "dance"), ("train now", "now"), ("plot", "plot"), ("eval", "--model"),
    ("train --no_such_flag 3", "--no_such_flag"), ("collect", "--model"),
    ("run --pool BAD", "--pool"), ("eval --model TINY --eval_data BAD", "absent"),
    ("train --model BAD", "no such folder"), ("collect --model BAD --device cpu", "hub id"),
    ("train --model TINY --data TRAIN --eval_data TRAIN", "train.jsonl: all of it is held out"),
    ("train --model TINY --data BAD", "absent"), ("train --model TINY DATA --pool BAD", "absent")]
BAD = [(*pair, None, "") for pair in BAD_WORDS + [(flag, flag.split()[0]) for flag in BAD_FLAGS]]
BAD += [(f"train --model {words} BAD", "folder", Path.mkdir, "") for words in
        ("", "TINY --data", "TINY --eval_data", "TINY DATA --pool")]
for place, table_of in (("--data", BAD_ROWS), ("DATA --pool", BAD_POOLS)):
    BAD += [(f"train --model TINY {place} BAD", named, write(rows), "")
            for named, rows in table_of.items()]
BAD += [("train --model BAD", *change) for change in BAD_MODELS]

@pytest.mark.parametrize("words, named, change, file", BAD)
def test_bad_input(words, named, change, file, tiny, data, tmp_path, error, monkeypatch):
    """Status 2 and one line that names the thing; no result is left behind."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    bad = shutil.copytree(tiny, "model") if file else tmp_path / named.partition(":")[0]
    (change or str)(Path(bad, file))  # str: nothing
    known = {"BAD": [bad], "TINY": [tiny], "DATA": data, "TRAIN": [data[1]]}
    line, before = sum([known.get(word, [word]) for word in words.split()], []), snapshot(".")
    assert named in error([*line, "--max_new_tokens", 24])
    made = snapshot(".").items() ^ before.items()
    assert {Path(name).name for name, _ in made if "/base/initial/" not in name} <= {"config.json"}

@pytest.mark.parametrize("place, fault", [
    ("response_logprobs", torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")),
    ("policy_loss", RuntimeError("DefaultCPUAllocator: can't allocate memory")),
    ("sample_tokens", RuntimeError("CUDNN_STATUS_ALLOC_FAILED")), ("score", MemoryError()),
    ("policy_loss", RuntimeError("MPS backend out of memory (MPS allocated: 9 GB)"))])
def test_out_of_memory(place, fault, words, tmp_path, error, monkeypatch):
    """In loading, in sampling, in the update: a line that names the flags to lower."""
    monkeypatch.setattr(rlep, place, failing_after(0, None, fault))
    assert "out of memory; lower --sample_rows and --mic" in error(words(tmp_path / "run"))

@pytest.mark.parametrize("command", ["train", "collect"])
@pytest.mark.parametrize("owner, name, calls, fault", [
    (Policy, "find_end", 0, TypeError), (rlep, "sample_tokens", 0, NameError),
    (rlep, "sample_tokens", 20, TypeError), (rlep, "score", 1, RuntimeError)])
def test_faults_of_the_file_keep_their_traceback(command, owner, name, calls, fault, words, tiny,
                                                 data, tmp_path, monkeypatch):
    """In loading, in check_model (16 tokens), in the phases: they are nobody's bad input."""
    commands = {"train": words(tmp_path), "collect": [
        "collect", *RUN, *data, "--model", f"{tiny}", "--out", f"{tmp_path}"]}
    monkeypatch.setattr(owner, name, failing_after(calls, getattr(owner, name), fault("its own")))
    with pytest.raises(fault, match="its own"):
        main(commands[command])

def test_a_terminal_without_unicode(tiny, tmp_path):
    """Questions and answers in Unicode are trained on, and what cannot be shown is replaced."""
    rows = [{"question": f"Zwölf − {i} ≥ ½?", "answer": "七"} for i in range(4)]
    flags = ["eval", "--model", str(tiny), "--data", write_rows(tmp_path / "data", rows),
             "--eval_size", "2", "--k", "1", "--max_new_tokens", "4", "--threads", "1"]
    variables = dict(LC_ALL="C", PYTHONUTF8="0", PYTHONCOERCECLOCALE="0", PYTHONIOENCODING="ascii")
    ended = subprocess.run([sys.executable, "rlep.py", *flags], cwd=HERE, capture_output=True,
                           env=os.environ | variables)
    assert ended.returncode == 0 and b"Zw?lf" in ended.stdout, ended.stderr

# ---- Copying out, the README, the scripts --------------------------------------------------------
@pytest.mark.parametrize("name, given, options", [
    ("group_advantages", [torch.tensor([1.0, -1.0]), torch.zeros(2)], {}),
    ("policy_loss", [*[torch.zeros(2, 3)] * 2, torch.tensor([1.0, 3.0]), torch.ones(2, 3)], {}),
    ("overlong_penalty", [95, 100, 10], {}), ("pass_at_k", [[[True, False]], 1], {}),
    ("rollout", ["MODEL", [[5, 6]], 3], dict(max_new_tokens=5, eos_token_id=1, pad_token_id=0,
                                             seeds=[1], top_p=0.9)),
    ("response_logprobs", ["MODEL", [[5, 6]] * 2, [[7, 8], [9]]], {}),
    ("verify", ["So \\boxed{\\frac{1}{2}\\text{ cm}}", "0.5"], {})])
def test_copying_a_function_out(name, given, options, policy):
    """With the imports and what its docstring says it calls, of the verifier its section."""
    wanted, space, parts = [name], {}, re.findall(r"^(?:import|from) .+", SOURCE, re.M)
    while wanted:
        function = getattr(rlep, wanted.pop())
        calls = re.findall(r"Calls ([\w, ]+)", function.__doc__ or "")
        wanted += [word for word in re.findall(r"\w+", " ".join(calls)) if hasattr(rlep, word)]
        parts.append(inspect.getsource(function))
    if name == "verify":
        parts.append(re.search(r"# ---- The verifier.*?(?=# ----.*---\n)", SOURCE, re.S)[0])
    given = [policy.model if str(value) == "MODEL" else value for value in given]
    exec("\n".join(parts), space)
    assert str(space[name](*given, **options)) == str(getattr(rlep, name)(*given, **options))

def test_readme_blocks(tmp_path, monkeypatch):
    """The README's Python runs as it stands; the script makes problems that can be read."""
    monkeypatch.chdir(tmp_path)
    rlep.make_base(settings("", base_steps=1), Path("runs/run-seed0/vanilla"))
    [block] = re.findall(r"```python\n(.*?)```", (HERE / "README.md").read_text(), re.DOTALL)
    exec(block, {})
    script("arithmetic").main()
    assert len(rlep.load_problems(Config(data="arithmetic.jsonl"))[0]) == 744

def script(name):
    """A module of the scripts that make the README's evidence."""
    return SimpleNamespace(**runpy.run_path(HERE / f".github/{name}.py"))

def test_evidence_table():
    """Means with Student's t, differences paired by seed, the share of steps to the best."""
    evidence, arms = script("evidence"), {}
    assert evidence.interval([1.0, 2.0, 6.0]) == pytest.approx((3.0, 4.30 * 7**0.5 / 3**0.5))
    for arm, seed, *curve in (("VANILLA", 3, 0, 0.1, 0.2), ("RLEP", 4, 0, 0.1, 0.3),
                              ("VANILLA", 4, 0, 0.2, 0.4), ("RLEP", 3, 0, 0.2, 0.5)):
        arms.setdefault(getattr(evidence, arm), {})[seed] = {"mean_at_k": curve[-1], "seed": seed,
            "curve": [*zip((0, 2, 4), curve)], "pass_at_k": 0.5, "entropy": 0.25}
    _, _, vanilla, ours = evidence.table(arms).splitlines()
    assert vanilla.startswith("| vanilla RL | 2 | 30.0 ± 127.")
    assert ours.endswith("| 10.0 ± 254.2 (-10.0 to +30.0) | 0.50 (0.50 to 0.50); 1 of 2 never | "
                         "50.0 ± 0.0 | 0.25 ± 0.00 |")
    assert "| 4 | 30.0 | 40.0 | 10.0 ± 254.2 | 1 of 2 |" in evidence.differences(arms)

def test_evidence_of_a_run(finished, data, tmp_path):
    """All arms have the demo's settings; the control learns the pool; pictures of runs."""
    evidence, base, pool = script("evidence"), finished / "base/policy", finished / "pool.jsonl"
    words = ["train", *RUN, *data, "--model", f"{base}", "--pool", f"{pool}"]
    evidence.supervise(rlep.parse(words)[1], tmp_path / "seed0/supervised_policy")
    means, entries = [], ExperiencePool.load(pool).entries.values()
    for policy in (load(base), load(tmp_path / "seed0/supervised_policy")):
        answers = [Answer(policy.encode_prompt(problem), policy.encode_answer(problem, text))
                   for problem, texts in entries for text in texts]
        logprobs, mask = policy.logprobs(answers, 1.0)
        means.append((logprobs.sum() / mask.sum()).item())
    assert means[1] > means[0] + 0.5
    with mock.patch.object(rlep, "main", return_value=0) as commands:
        evidence.run_seed(0, tmp_path)
    configs = [vars(rlep.parse(call.args[0])[1]) for call in commands.mock_calls]
    same = rlep.EMBEDDED.keys() - {"steps"}
    assert [{name: config[name] for name in same} for config in configs] == [
        {name: rlep.EMBEDDED[name] for name in same}] * 6
    for folder, place in ((finished, "main"), (finished / "vanilla", "twice")):
        shutil.copytree(folder, tmp_path / "seed0" / place, ignore=lambda *_: ["policy"])
    evidence.main(["report", str(tmp_path)])
    assert "vanilla RL, 48 steps" in (tmp_path / "table.md").read_text()
    evidence.main(["pairs", str(tmp_path / "seed0/main")])
    for picture in ("curves.png", "evidence.png", "seed0/curves.png"):
        assert (tmp_path / picture).read_bytes().startswith(b"\x89PNG")

@pytest.mark.parametrize("updates", [1, 2])
def test_bench(updates, tiny, tmp_path, capsys, monkeypatch):
    """The benchmark prints what the README's table has, with so many updates a step."""
    prompts = write_rows(tmp_path / "prompts", [{"prompt": "1*2+3"}, {"prompt": "3*4"}])
    monkeypatch.setattr(rlep, "score", rlep.score)  # the script changes it
    with spy_on("update_policy") as update:
        script("bench").main(["--model", str(tiny), "--prompts", prompts, "--max_new_tokens", "8",
                              "--group_size", "4", "--steps", "1", "--updates", f"{updates}"])
    assert update.call_count == 2 * updates  # a step warms up
    row = json.loads(capsys.readouterr().out)
    assert 1 < row["mean_length"] <= 8 and row["step_tok_s"] < row["sample_tok_s"]
    assert row["peak_mib"] > 100 and row["update_tok_s"] > 0
