"""Tests of rlep.py, in the order of the file: the equations first, bad input and resuming last.
Nothing is downloaded. Those marked cuda run where there is a GPU."""
import ast
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
from tokenizers import processors
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

import rlep
from rlep import Answer, Config, ExperiencePool, Policy, Problem, UserError, main, verify

torch.set_num_threads(1)
HERE = Path(__file__).parent
SOURCE = (HERE / "rlep.py").read_text()
RUN = ("--threads 1 --warmup_steps 60 --steps 6 --learning_rate 2e-3 --prompts_per_step 4 "
       "--minibatch_prompts 2 --group_size 16 --max_new_tokens 24 --eval_every 3 --save_every 2 "
       "--k 4 --collect_k 32 --collect_temperature 2 --collect_top_p 1 --sample_rows 64").split()
TRAIN = ("--threads 1 --prompts_per_step 2 --minibatch_prompts 1 --group_size 8 --max_new_tokens 8 "
         "--overlong_buffer 7 --eval_every 3 --k 2 --seed 1").split()  # it can learn to be short

# ---- Helpers and fixtures ------------------------------------------------------------------------
def write_rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)

def read_rows(path):
    return [json.loads(line) for line in Path(path).read_text().splitlines()]

def chat(text):
    return [{"role": "user", "content": text}]

def settings(model, **changes):
    """A configuration for the CPU, in which nothing is left to be decided."""
    fixed = {"model": str(model), "device": "cpu", "bf16": 0, "micro_tokens": 1024}
    return Config(**fixed | changes)

def step_config(**changes):
    return settings("", **dict(group_size=16, max_new_tokens=6, minibatch_prompts=1) | changes)

def load(model, **changes):
    return Policy(settings(model, **changes), [Problem("1*2+3*4 mod 10 = ", "4")])

def snapshot(folder):
    """Every file below a folder, byte for byte."""
    files = sorted(path for path in Path(folder).rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}

def result_of(folder):
    """What a run leaves, whatever happened on the way: policies, pools, metrics without timings."""
    return {name: re.sub(rb'"\w+_s": [\d.e-]+', b"", content)
            for name, content in snapshot(folder).items()
            if re.search(r"(^|/)policy/|(pool|metrics)\.jsonl$", name)}

def spy_on(name):
    """While it is open, calls of a function of rlep are noted."""
    return mock.patch.object(rlep, name, wraps=getattr(rlep, name))

def crash(name, number, words):
    """Runs a command that dies at so many-th call of a function of rlep."""
    with spy_on(name) as function, pytest.raises(SystemExit, match="crash"):
        function.side_effect = [mock.DEFAULT] * (number - 1) + [SystemExit("crash")]
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
    sevens = [p for p in rlep.embedded_problems(400, seed=1) if p.gold == "7"][:24]
    rows = [{"prompt": chat(problem.question), "answer": "7"} for problem in sevens]
    write_rows(folder / "train.jsonl", rows[:16])
    write_rows(folder / "held_out.jsonl", rows[16:])
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
    """The folder of a complete, undisturbed run, --out run; tests do not change it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(files)
        assert main(["run", *RUN, *data, "--out", "run"]) == 0
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
            status = main(list(map(str, words)))
        except SystemExit as end:  # a bad flag
            status = end.code
        lines = [line for line in capsys.readouterr().err.splitlines() if line.strip()
                 and not re.search(r"it/s|s/it|\x1b", line)]  # progress bars
        assert len(lines) == 1 and lines[0].startswith("rlep.py: error: ") and status == 2, lines
        return lines[0]
    return error

# ---- The equations -------------------------------------------------------------------------------
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

@pytest.mark.parametrize("kind, changes", [
    ("Llama", {"attention_dropout": 0.5}), ("Llama", {"num_key_value_heads": 4}),
    ("Qwen2", {}), ("Qwen2", {"hidden_size": 8, "tie_word_embeddings": True})])
def test_eq4_update_equals_a_slow_loop(kind, changes, policy, monkeypatch):
    """Log-probs, loss and gradient; one mean over the mini-batch, however it is cut; no dropout."""
    policy.model, advantages = make_model(kind, **changes), torch.linspace(-99, 99, 12)
    advantages[[1, 4, 5, 6, 7]] = 0.0  # among them a whole group
    answers = mini_batch(advantages=advantages)
    answers = [answers[i] for i in (3, 8, 0, 1, 2, 9, 4, 5, 11, 10, 6, 7)]  # some prompts return
    double, losses = copy.deepcopy(policy.model).double(), []
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
    gradient, kept = gradients(double), []
    optimizer = torch.optim.SGD(policy.model.parameters())
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

def test_micro_batches():
    """With padding; in order of prompt and length; without those that have no gradient."""
    prompts = [[3] * 5, [2] * 9, [1] * 5]
    answers = [Answer(prompts[i % 3], [0] * (1 + i % 4), advantage=1.0) for i in range(12)]
    answers.append(Answer(prompts[0], [0]))
    answers[3].response = [0] * 30
    batches = rlep.micro_batches(answers, 24)
    found = [[(a.prompt[0], len(a.response)) for a in batch] for batch in batches]
    assert found == [[(1, 1), (1, 2), (1, 3)], [(1, 4), (3, 1)], [(3, 2), (3, 3)], [(3, 30)],
                     [(2, 1), (2, 2)], [(2, 3)], [(2, 4)]]
    assert [len(batch) for batch in rlep.micro_batches(answers, 1000)] == [12]
    ragged = [Answer([1], [0] * 10, advantage=1.0), Answer([1] * 5, [0], advantage=1.0)]
    assert len(rlep.micro_batches(ragged, 29)) == 2  # two rows of 5 + 10 tokens

def test_overlong_penalty():
    """None up to limit - buffer, factor at the limit, a line between; buffer 0: off."""
    penalties = [rlep.overlong_penalty(length, 100, 20, 0.5) for length in (1, 80, 81, 90, 100)]
    assert penalties == pytest.approx([0, 0, -0.025, -0.25, -0.5])
    assert rlep.overlong_penalty(90, 100, 20) == -0.5 and rlep.overlong_penalty(99, 99, 0) == 0

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
    pool.answers[Problem("unsolved", "3")] = []
    pool.save(path)
    with pytest.raises(OSError):
        pool.save(tmp_path)  # a folder, which stays
    row, *others = read_rows(path)
    assert row["prompt"] == [{"role": "system", "content": "Think."}, *chat("q")]
    assert row["reward_model"] == {"ground_truth": "2", "style": "rule",
                                   "candidates": [*texts, texts[0]]} and "data_source" in row
    row["reward_model"]["candidates"].append("\\boxed{3}")
    again = ExperiencePool.load(write_rows(path, [row, *others]))
    assert again.answers == pool.answers and [p.gold for p in again.answers] == ["2", "4", "3"]
    with mock.patch.object(rlep, "score", side_effect=KeyError), pytest.raises(KeyError):
        ExperiencePool.load(path)  # the fault of a reward of one's own, not of the file

def test_replays(policy, tmp_path, capsys):
    """Verified by the training file's gold; neither too long nor to other questions; counted."""
    rows = [pool_row("a", "2", "\\boxed{2}", "\\boxed{3}"), pool_row("b", "4", "\\boxed{4}"),
            pool_row("c", "5", "\\boxed{5}", "1\\boxed{5}", "12\\boxed{5}"),
            pool_row("c", "6", "\\boxed{6}")]
    problems, path = [Problem("c", "5"), Problem("a", "2.0")], write_rows(tmp_path / "pool", rows)
    config = settings("", pool=path, max_new_tokens=5)  # \boxed{, 5, } and <eos> are 4 tokens
    pool = rlep.load_replays(policy, problems, config)
    assert pool.answers == {problems[0]: ["\\boxed{5}", "1\\boxed{5}"], problems[1]: ["\\boxed{2}"]}
    assert f"{path}: 3 of 6 serve" in capsys.readouterr().out

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
    policy.model, rows = make_model(kind, initializer_range=0.15), []
    policy.sampler = policy.model
    policy.sampler.register_forward_pre_hook(lambda _, inputs: rows.extend(map(len, inputs)))
    prompts = {Problem(str(answer.prompt), ""): answer.prompt for answer in mini_batch()}
    problems, policy.encode_prompt, policy.ends = list(prompts), prompts.get, ends
    config = settings("", temperature=temperature, top_p=top_p, max_new_tokens=60, seed=3)
    found = list(policy.sample(problems, 4, config, "test", 4))
    flat = [answer for _, answers in found for answer in answers]
    assert rows[0] == 12 and len(rows) <= max(map(len, flat)) + 3
    for t in range(4, len(rows), 4):  # every 4 tokens it is looked which answers have ended
        assert rows[t] <= sum(len(answer) > t for answer in flat) / 0.8
    for problem, answers in found:
        seed = rlep.seed_of(3, "test", 4, problem)
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
HEADS = BASE | dict(head_dim=8)
LONGROPE = {"rope_type": "longrope", "rope_theta": 1e4, "original_max_position_embeddings": 40,
            "factor": 2.0, "short_factor": [1.0] * 4, "long_factor": [4.0] * 4}
GPT2 = dict(vocab_size=40, n_embd=32, n_layer=2, n_head=4, n_positions=512, initializer_range=0.25,
            pad_token_id=0, eos_token_id=1, bos_token_id=None)
WINDOW = dict(use_sliding_window=True, sliding_window=8, max_window_layers=1)
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
    ("qwen2", BASE | dict(use_sliding_window=False, sliding_window=8)), ("qwen2", BASE | WINDOW),
    ("qwen3", HEADS), ("mistral", BASE | dict(sliding_window=8)),
    ("gemma3_text", HEADS | dict(sliding_window=8)),
    ("gemma3", dict(text_config=HEADS | dict(sliding_window=8), vision_config=VISION,
                    mm_tokens_per_image=1, image_token_id=39, boi_token_id=38, eoi_token_id=37)),
    ("mixtral", BASE | dict(num_local_experts=4, num_experts_per_tok=2, router_jitter_noise=0.3)),
    ("gpt2", GPT2 | dict(resid_pdrop=0.5, embd_pdrop=0.5, attn_pdrop=0.5)),
    ("opt", BASE | dict(ffn_dim=48, word_embed_proj_dim=32, layerdrop=0.5, dropout=0.5))])
def test_good_models_train_right(kind, settings, model_folder, words, tmp_path):
    """All equals plain passes, also short windows and prompts of one token; no dropout; a step."""
    folder = model_folder(kind, settings)
    policy = load(folder)
    rng, plain = random.Random(0), AutoModelForCausalLM.from_pretrained(folder).eval()
    prompts = [[rng.randrange(2, 22) for _ in range(9)]] * 2 + [[5, 6, 7], [4]]
    responses = [[rng.randrange(2, 22) for _ in range(n)] for n in (40, 7, 21, 3)]
    logprobs, mask = rlep.response_logprobs(policy.model, [*map(tuple, prompts)], responses)
    slow = [slow_logprobs(plain, *pair) for pair in zip(prompts, responses)]
    assert torch.allclose(logprobs[mask], torch.cat(slow), atol=1e-4)
    logprobs.sum().backward()
    torch.cat(slow).sum().backward()
    for ours, theirs in zip(policy.model.parameters(), plain.parameters()):
        if theirs.grad is not None:
            assert (ours.grad - theirs.grad).norm() < 1e-3 * theirs.grad.norm() + 1e-5
    greedy = rlep.rollout(plain, prompts[1:], 2, max_new_tokens=20, temperature=0, eos_token_id=1,
                          pad_token_id=0)
    for prompt, group in zip(prompts[1:], greedy):
        assert group == slow_rollout(plain, prompt, 2, 20, 0, [1], 0, 1.0)
    assert main(words(tmp_path / "run", *LONG, folder)) == 0
    row = read_rows(tmp_path / "run/metrics.jsonl")[1]
    assert row["trained_tokens"] and row["skipped"] == 0 and math.isfinite(row["loss"])

# ---- The policy ----------------------------------------------------------------------------------
TURNS = ("{% for m in messages %}{{ m['content'] }}{% if m['role'] == 'assistant' %}|\n<end>"
         "{% endif %}{% endfor %}{% if add_generation_prompt %}?<eos>{% endif %}")

def begin_with(policy, form):
    """Has the tokenizer put something round every text."""
    policy.tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=form, special_tokens=[("<pad>", 0), ("<eos>", 1)])

@pytest.mark.parametrize("listed", [True, False])
def test_prompts_and_responses(listed, policy, tmp_path):
    """The template; the end of a turn, also if only added (Gemma, Phi); stops; <eos> as text."""
    policy.tokenizer.add_tokens(["|"])  # which is not special, and the line's end is unknown
    if listed:
        policy.tokenizer.add_special_tokens({"additional_special_tokens": ["<end>"]})
    else:
        policy.tokenizer.add_tokens([transformers.AddedToken("<end>", special=True)])
        assert 23 not in policy.tokenizer.all_special_ids
    policy.tokenizer.chat_template = TURNS
    begin_with(policy, "<pad> $A")  # a template has its own beginning
    policy.model.resize_token_embeddings(24)
    policy.model.generation_config.eos_token_id = [1, 5] if listed else 0
    policy.save(f"{tmp_path}/model/")
    policy, problem = load(tmp_path / "model"), Problem("2=", "3", (("system", "1+"),))
    assert set(policy.ends) == {23, *([1, 5] if listed else [0])}
    assert policy.encode_answer("7*3=1") == [13, 17, 9, 18, 7, 23]
    assert policy.decode([13, 17, 9, 18, 7, 23]) == "7*3=1" and policy.decode([13, 17]) == "7*"
    spelt = policy.encode_answer("1<eos>2")
    assert 1 not in spelt and len(spelt) == 8
    assert policy.encode_prompt(problem) == policy.encode_answer("1+2=?")[:-1] + [1]

@pytest.mark.parametrize("form, first", [("<pad> $A", [0]), ("$A <eos>", [])])
def test_prompts_without_a_template(form, first, policy):
    """What the tokenizer puts in front stays; an eos that it appends to every text does not."""
    policy.tokenizer.chat_template = None
    begin_with(policy, form)
    text = policy.encode_answer("1+\n\nQuestion: 2=\nAnswer:")[:-1]
    assert policy.encode_prompt(Problem("2=", "3", (("system", "1+"),))) == first + text

def test_mixed_precision(tiny):
    """Arithmetic in bf16, weights in fp32 that keep small updates, a copy that follows them."""
    policy, answers = load(tiny, bf16=1), mini_batch(20)
    logprobs, mask = policy.logprobs(answers, 1.0)
    with torch.no_grad():
        exact = torch.cat([slow_logprobs(policy.model, a.prompt, a.response) for a in answers])
    assert logprobs.dtype == torch.float32 and 1e-5 < (logprobs[mask] - exact).abs().max() < 0.03
    optimizer = torch.optim.AdamW(policy.model.parameters(), weight_decay=0.0)
    rlep.update_policy(policy, optimizer, answers, settings(""), 1e-6)
    ones = policy.model.model.norm.weight  # until this update
    assert (ones - 1).abs().median().item() == pytest.approx(1e-6, rel=0.1)
    for _ in range(2):
        rlep.update_policy(policy, optimizer, answers, settings(""), 1e-2)
        next(policy.sample(rlep.embedded_problems(3, 0), 4, settings(""), "test"))
        for mine, trained in zip(policy.sampler.parameters(), policy.model.parameters()):
            assert trained.dtype == torch.float32 and torch.equal(mine, trained.bfloat16())
        buffers = zip(policy.sampler.buffers(), policy.model.buffers())
        assert all(mine.dtype == torch.float32 and torch.equal(mine, b) for mine, b in buffers)

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
    texts = [rlep.rollout(model.to(device), [[7, 8, 9]], 4, max_new_tokens=20, seeds=[3],
                          eos_token_id=1, pad_token_id=0) for device in ("cpu", "cuda")]
    assert texts[0] == texts[1]

# ---- The training step ---------------------------------------------------------------------------
@pytest.fixture
def two_problems():
    """Two problems, and a pool with three answers to the first one only."""
    (problem, other), pool = rlep.embedded_problems(2, 5), ExperiencePool()
    pool.answers[problem] = [f"{x}\\boxed{{{problem.gold}}}" for x in ("", "Work: ", "1+1=2,")]
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
    texts = [policy.decode(answer.response) for answer in replays]
    assert all(answer.correct and answer.response[-1] == 1 for answer in replays)
    assert set(texts) < set(pool.answers[problems[0]]) and texts[0] != texts[1]
    pool.answers = {problem: [f"1+{i}" for i in range(9)] for problem in problems}
    for seed, step in ((0, 1), (0, 2), (1, 1), (0, 1)):
        config = step_config(replays=4, seed=seed)
        for group in rlep.make_groups(policy, problems, pool, config, step):
            for replayed in (False, True):
                parts.append([a.response for a in group if a.replayed == replayed])
    assert parts[:4] == parts[-4:] and all(parts[:12].count(part) == 1 for part in parts)

def test_eq5_a_step(policy, two_problems, monkeypatch):
    """One baseline with the replays; old log-probs are the start's, where there may be others."""
    (problem, other), pool = two_problems
    third, right = Problem("1*1 mod 10 = ", "1"), pool.answers[problem]
    start, seen, real = copy.deepcopy(policy.model), [], rlep.update_policy

    def update(policy, optimizer, answers, config, rate):
        seen.append((answers, [answer.old_logprobs for answer in answers], rate))
        return real(policy, optimizer, answers, config, rate)

    monkeypatch.setattr(rlep, "score", lambda asked, text: len(text) % 3 if asked == third else
                        1.0 if text in right else -1.0)
    monkeypatch.setattr(rlep, "update_policy", update)
    config = step_config(temperature=0.6, learning_rate=0.08, lr_warmup_steps=4)
    optimizer, problems = torch.optim.AdamW(policy.model.parameters()), [problem, third, other]
    row = rlep.train_step(policy, optimizer, problems, pool, config, 1)
    (first, *olds, rate), (second, kept, _), (last, *more, _) = seen
    assert [a.advantage for a in first] == pytest.approx([-0.3436] * 16 + [2.7487] * 2, abs=1e-4)
    assert [answer.advantage for answer in last] == [0.0] * 16
    assert olds + more == [[None] * 18, [None] * 16]
    for answer, old in zip(second, kept):
        assert torch.allclose(old, slow_logprobs(start, answer.prompt, answer.response, 0.6),
                              atol=1e-5)
        now = slow_logprobs(policy.model, answer.prompt, answer.response, 0.6)
        assert not torch.allclose(old, now, atol=0.01)  # the policy has changed by then
    fresh = [answer for answer in first + second + last if not answer.replayed]
    assert row["replays"] == 2 and row["zero_variance"] == pytest.approx(1 / 3)
    assert row["truncated"] == np.mean([len(answer.response) == 6 for answer in fresh]) > 0
    assert row["accuracy"] == np.mean([answer.correct for answer in fresh]) > 0
    assert all(answer.correct == (answer.reward > 0) for answer in second)  # your own score
    # Entropy: minus the log-probs, at the start of the step, of fresh answers with an advantage.
    surprise = [-slow_logprobs(start, a.prompt, a.response, 0.6) for a in fresh if a.advantage]
    assert row["entropy"] == pytest.approx(torch.cat(surprise).mean().item(), abs=1e-5)
    config.minibatch_prompts = 2
    rlep.train_step(policy, optimizer, problems, pool, config, 9)
    assert rate == 0.02 and [(len(a), new) for a, _, new in seen[3:]] == [(34, 0.08), (16, 0.08)]
    assert rlep.learning_rate(step_config(lr_warmup_steps=0, learning_rate=0.5), 1) == 0.5

def test_metrics_without_gradient_are_null(policy, two_problems, monkeypatch):
    """Where no group teaches, no entropy; where no update is taken, no loss, but it is counted."""
    (problems, _), optimizer = two_problems, torch.optim.AdamW(policy.model.parameters())
    monkeypatch.setattr(rlep, "score", lambda problem, text: -1.0)
    row = rlep.train_step(policy, optimizer, problems, ExperiencePool(), step_config(), 1)
    assert row["entropy"] is None and row["zero_variance"] == 1 and row["grad_norm"] == 0
    some = dict(loss=2.0, clip_low=0.5, clip_high=0.0, grad_norm=3.0, skipped=0)
    group = mini_batch(advantages=range(12))  # the first teaches nothing
    for updates, expected in (([{"skipped": 1}] * 2, dict.fromkeys(some) | {"skipped": 1}),
                              ([some, {"skipped": 1}], some | {"skipped": 0.5})):
        metrics = rlep.metrics_of([group], updates, step_config())
        assert {name: metrics[name] for name in some} == expected
    assert metrics["sampled_tokens"] == metrics["length"] * 12 == 73
    assert metrics["trained_tokens"] == 73 - len(group[0].response)

# ---- Evaluation ----------------------------------------------------------------------------------
def test_evaluation(policy, monkeypatch):
    """mean@k, its interval over questions, pass@k (unbiased), maj@k; every question, own gold."""
    correct = [[True, False, False, False], [True] * 4, [False] * 4]
    assert rlep.mean_at_k(correct) == (pytest.approx(5 / 12), [0.0, 1.0])  # not below 0, above 1
    low, high = rlep.mean_at_k([[True, False]] * 8 + [[True, True]])[1]
    assert (high - low) / 2 == pytest.approx(1.96 * np.std([0.5] * 8 + [1.0], ddof=1) / 3)
    assert rlep.mean_at_k([[True, False]]) == (0.5, [0.5, 0.5])
    found = [rlep.pass_at_k(correct, k) for k in (4, 1, 2)]
    assert found == pytest.approx([2 / 3, 5 / 12, (0.5 + 1 + 0) / 3])  # 1 - C(3, 2) / C(4, 2) = 0.5
    answers = [["3", "1", "1", None], ["5", "5", "6", "6"], [None, None, None, "2"]]
    marks = [[False, True, True, False], [True, True, False, False], [False] * 4]
    assert rlep.maj_at_k(answers, marks) == pytest.approx(2 / 3)  # not the first; a tie; blanks
    assert rlep.maj_at_k([[None, None, "2"], [None, None]], [[False, False, True]] * 2) == 0.5
    problems, wrong = rlep.embedded_problems(6, 0), policy.encode_answer("\\boxed{11}")
    own = [policy.encode_answer(f"\\boxed{{{problem.gold}}}") for problem in problems]
    monkeypatch.setattr(policy, "sample", lambda asked, k, *_: [
        (asked[i], ([own[i]] * (i % 3) + [wrong] * k)[:k]) for i in range(6) if asked == problems])
    monkeypatch.setattr(rlep, "score", lambda problem, text: 1 - verify(text, problem.gold))
    row = rlep.evaluate(policy, problems, settings("", k=2), "your own score")
    assert (row["mean_at_k"], row["pass_at_k"], row["maj_at_k"]) == pytest.approx((1/2, 2/3, 1/3))

# ---- The phases ----------------------------------------------------------------------------------
def test_run_leaves_everything(finished):
    """Every file, with what other programs read; RLEP alone replays; the pool is verified."""
    summary = read_rows(finished / "summary.json")[0]
    for arm in ("vanilla", "rlep"):
        own = read_rows(finished / arm / "summary.json")[0]
        rows = read_rows(finished / arm / "metrics.jsonl")
        assert [row["step"] for row in rows] == list(range(7)) and summary[arm] == own
        assert own["curve"] == [[r["step"], r["mean_at_k"]] for r in rows if "mean_at_k" in r]
        assert [step for step, _ in own["curve"]] == [0, 3, 6] and own["seed"] == 0
        assert own["curve"][0] == summary["vanilla"]["curve"][0]  # the same base
        assert own["arm"] == ("RLEP, M = 2" if arm == "rlep" else "vanilla RL")
        assert own["ci95"][0] <= own["mean_at_k"] == own["curve"][-1][1] <= own["ci95"][1]
        assert all((0 < row["replays"] <= 8) == (arm == "rlep") for row in rows[1:])
        assert not any(row["skipped"] for row in rows[1:])
        assert rows[-1]["reward"] > rows[1]["reward"] + 0.2  # it learns
    held = [row["reward_model"]["candidates"] for row in read_rows(finished / "pool.jsonl")]
    assert summary["questions"] == len(held) >= 4 and summary["answers"] == sum(map(len, held))
    assert all(len(texts) >= 2 and all(verify(t, "7") for t in texts) for texts in held)
    assert not list(finished.rglob("*.partial"))
    assert (finished / "curves.png").read_bytes().startswith(b"\x89PNG")

def test_eval_reproduces_the_summary(finished, files, data, capsys):
    """eval asks each held-out question once, with the run's result; transformers loads it."""
    folder = finished / "rlep/policy"
    with spy_on("rollout") as rollout:
        assert main(["eval", *RUN, *data, "--model", f"{folder}"]) == 0
    own, printed = read_rows(finished / "rlep/summary.json")[0], capsys.readouterr().out
    assert all(f"{x}@4 {own[f'{x}_at_k']:.1%}" in printed for x in ("mean", "maj", "pass"))
    asked = sum([call.args[1] for call in rollout.mock_calls if "seeds" in call.kwargs], [])
    model, tokenizer = (x.from_pretrained(folder) for x in (AutoModelForCausalLM, AutoTokenizer))
    assert [tokenizer.decode(prompt) for prompt in asked] == [
        row["prompt"][0]["content"] for row in read_rows(files / "held_out.jsonl")]
    theirs = model.generate(torch.tensor(asked[:1]), do_sample=False, max_new_tokens=24)
    assert [[theirs[0, len(asked[0]):].tolist()]] == rlep.rollout(
        model, asked[:1], 1, max_new_tokens=24, temperature=0, eos_token_id=1, pad_token_id=0)
    state = torch.load(finished / "rlep/checkpoint.pt", weights_only=True)
    assert all(torch.equal(state["model"][name], x) for name, x in model.state_dict().items())
    assert state["adam"]["param_groups"][0]["weight_decay"] == 0.1
    assert main(["eval", *RUN, *data, "--model", f"{folder}", "--temperature", "0"]) == 0

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
            replays = [answer for answer in group if answer.replayed]
            assert len(replays) == (2 if arm == "rlep" and problem.question in known else 0)
        return groups

    monkeypatch.setattr(rlep, "make_groups", spy)
    for arm, more in (("vanilla", []), ("rlep", ["--pool", pool])):
        more += ["--max_new_tokens", 24, "--train_size", 15, "--steps", 14]
        assert main(words(tmp_path / arm, *more)) == 0
        assert "mean_at_k" in read_rows(tmp_path / arm / "metrics.jsonl")[-1]  # always at the end
    questions, seeds = zip(*seen["rlep"])
    assert seen["vanilla"] == seen["rlep"] and len(set(seeds)) == len(seeds) == 28
    first, second = questions[:14], questions[14:]
    assert len(set(first)) == len(set(second)) == 14 and first != second

def test_collection_has_its_own_sampling_and_rules(tiny, data, tmp_path, monkeypatch):
    """Its temperature, top-p, K; the score decides; cut answers do not count; two are needed."""
    policy, seen = load(tiny), []
    right, other, wrong = (policy.encode_answer(f"{text}}}") for text in
                           ("\\boxed{9", "1+6=9\\boxed{9", "\\boxed{7"))
    groups = [[right, other, wrong], [right, other[:-1], wrong], [right, right, other]]
    groups += 13 * [[wrong, wrong, right]]

    def sample(policy, problems, k, config, *purpose):
        seen.append((k, config.temperature, config.top_p))
        return [(problem, groups.pop(0)) for problem in problems]

    monkeypatch.setattr(Policy, "sample", sample)
    monkeypatch.setattr(rlep, "score", lambda problem, text: text.count("9"))  # the gold is 7
    command = ["collect", *data, "--model", f"{tiny}", "--out", f"{tmp_path}/out", "--threads", "1"]
    assert main(command + "--temperature 0.5 --top_p 0.6 --collect_temperature 1.7 --collect_top_p "
                "0.9 --collect_k 3 --prompts_per_step 3".split()) == 0
    assert set(seen) == {(3, 1.7, 0.9)} and not groups
    held = [row["reward_model"]["candidates"] for row in read_rows(tmp_path / "out/pool.jsonl")]
    texts = [policy.decode(response) for response in (right, other)]
    assert held == [texts, [texts[0], *texts]]

def test_bf16_goes_on(finished, words, tmp_path):
    """With --bf16 1, too, a stopped run ends as an undisturbed one."""
    more = ["--steps", 3, "--bf16", 1, "--max_new_tokens", 24, "--pool", finished / "pool.jsonl"]
    assert main(words(tmp_path / "whole", *more)) == 0
    crash("train_step", 3, words(tmp_path / "stopped", *more))
    assert main(words(tmp_path / "stopped", *more)) == 0
    assert result_of(tmp_path / "stopped") == result_of(tmp_path / "whole")

def test_plot(finished, trained, tmp_path, capsys):
    """A run's two arms and a train of its own: their last figures, and a picture."""
    capsys.readouterr()
    assert main(["plot", str(finished), str(trained), "--out", f"{tmp_path}/picture"]) == 0
    *lines, picture = capsys.readouterr().out.splitlines()
    for line, folder in zip(lines, (finished / "vanilla", finished / "rlep", trained), strict=True):
        summary = read_rows(folder / "summary.json")[0]
        assert line == f"{summary['arm']} ({folder}), step 6: mean@k {summary['mean_at_k']:.1%}"
    assert Path(picture.split()[-1]).read_bytes().startswith(b"\x89PNG")

# ---- Data files ----------------------------------------------------------------------------------
def test_problems_of_files(tmp_path):
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
            (pool_row("r", "3", "\\boxed{3}"), "r", "3")):
        problem = rlep.row_to_problem(row, "f:1")
        assert problem == Problem(question.replace("BOX", rlep.BOXED), "") and problem.gold == gold
    rows = [{"prompt": chat("a"), "answer": 1}, {"prompt": chat("a"), "answer": 3},
            {"prompt": [{"role": "system", "content": "s"}, *chat("a")], "answer": 2},
            {"prompt": chat("b"), "answer": 4}, {"prompt": chat("c"), "answer": 5}]
    train, test = write_rows(tmp_path / "a", rows), write_rows(tmp_path / "b", rows[3:])
    problems, held_out = rlep.load_problems(Config(data=train, eval_data=test, eval_size=1))
    assert problems == [Problem("a", ""), Problem("a", "", (("system", "s"),)), Problem("c", "")]
    assert held_out == [Problem("b", "")]  # what is held out is not trained on
    assert [problem.gold for problem in problems + held_out] == ["1", "2", "5", "4"]
    assert len(rlep.load_problems(Config(eval_data=test))[0]) == 512
    write_rows(tmp_path / "a", [{"question": f"{i % 30}", "answer": i} for i in range(40)])
    problems, held_out = rlep.load_problems(Config(data=train, eval_size=8, train_size=15))
    assert [int(p.gold) for p in problems + held_out] == [*range(15), *range(22, 30)]

# ---- The embedded problems and their base model --------------------------------------------------
def test_embedded_problems():
    """Lengths 2, 3, 4 in turn, golds and noiseless workings right."""
    rng, quiet, problems = random.Random(0), random.Random(0), sum(rlep.load_problems(Config()), [])
    quiet.random, ends = lambda: 0.5, Counter()
    for place, problem in enumerate(problems):
        length = problem.question.count("*")
        assert length == 2 + place % 3 and eval(problem.question[:-10]) % 10 == int(problem.gold)
        working = rlep.write_working(problem.question, quiet)
        steps = working.split("\\")[0].split(",")
        assert len(steps) == 2 * length - 1 and all(eval(s[:-2]) % 10 == int(s[-1]) for s in steps)
        assert verify(working, problem.gold)
        ends[problem.question.startswith(steps[0][:3])] += 1
    assert min(ends[True], ends[False]) > 300  # it works from either end
    wrong = [not verify(rlep.write_working(p.question, rng), p.gold) for p in problems]
    assert 0.1 < np.mean(wrong) < 0.35  # 3 to 7 results of noise 0.05 each
    assert len(set(problems)) == 768

def test_what_the_base_is_taught(tmp_path, monkeypatch):
    """Three in four to work once begun; else to give up, or to begin, the rarer the longer."""
    taught, works, update = Counter(), Counter(), mock.Mock()
    monkeypatch.setattr(rlep, "update_policy", update)
    rlep.make_base(settings("", warmup_steps=300, temperature=0.5), tmp_path)
    for policy, _, answers, config, _ in (call.args for call in update.mock_calls):
        for answer in answers:
            prompt, text = policy.decode(answer.prompt), policy.decode(answer.response)
            begun = prompt.endswith("Work: ")
            taught[begun, text == "\\boxed{?}"] += 1
            works[prompt.count("*")] += not begun and text.startswith("Work: ")
            assert answer.advantage == config.temperature == 1 and begun != (text[0] in "W\\")
    assert taught[True, False] == 3600 * 2 and not taught[True, True]
    assert taught[False, False] == sum(works.values()) < 0.03 * 2400
    assert works[2] > 2 * works[3] > 2 * works[4]

# ---- The verifier --------------------------------------------------------------------------------
SAME = [
    ("8{,}125", "8125"), (r"8\,125\,000", "8125000"), (r"8,\!125", "8125"), ("9,999.50", "9999.5"),
    (r"36\%", "36"), (r"\frac{3}{8}", "0.375"), (r"\dfrac{5}{4}", "1.25"), ("７", "7"), ("‑5", "-5"),
    (r"\tfrac25", "2/5"), (r"2\frac35", "2.6"), (r"4\frac{1}{3}", r"\frac{13}{3}"), ("1，3", "1,3"),
    (r"-1\frac{1}{8}", r"-\frac98"), ("8,125", "8125"), (r"36\text{ percent}", r"36\%"),
    ("50％", r"50\%"), (r"\$45", "45"), (r"\$4,500", "4500"), (r"7\ \text{km/h}", "7"), ("½", "0.5"),
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
    ("sqrt(3)", r"\sqrt3")]
DIFFERENT = [
    (r"5\text{ tenths}", "5"), (r"5\ 6", "56"), ("5 6", "30"), (r"\infty-\infty", "0"), ("x", "X"),
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
    (r"10^{17}+\sqrt2", r"10^{17}+\sqrt3"), (r"\sqrt2", r"\sqrt{2.0001}")]
RESTATED = [
    ("6+0", "6"), ("19^2 + 2(19) + 1", "400"), (r"99\times 99", "9801"), ("-(-42)", "42"),
    ("(2x-5)(x+7)-(x+5)(2x-1)", "-30"), ("7-10", "-3"), ("x=60-18", "x=42"), ("6+7, 8+9", "13, 17"),
    (r"\frac12-\frac13", r"\frac16"), (r"(9+8)\text{ cm}", r"17\text{ cm}"), ("(0,3+4]", "(0,7]"),
    (r"6\cdot7\%", r"42\%"), ("(-6)(-7)", "42"), (".5 + .25", "0.75"), (r"84 \div 2", "42"),
    (r"(6+7)\pi", r"13\pi"), ("-5 + -3", "-8"), ("1000/8/5", "25"), (r"\frac{84}{2}", "42")]

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
    (r"\boxed{5} and \boxed{6}", "6,5"), ("The answer is 72, in total", "72")]
NOT_EXTRACTED = [
    (r"$\boxed{3}$, $\boxed{4}$", "4"), ("4 words", "4"), (r"\boxed{1}/\boxed{2}", "2"),
    (r"4 \boxed{", "4"), (r"Answer: 4 \boxed{}", "4"), (r"4: \boxed{?}", "4"),
    (r"\boxed{\frac12", r"\frac12"), ("Answer: 3 or 4", "4"), ("Answer: 5; alternatively 6", "5"),
    (r"\boxed{5 \boxed{6}}", "6"), ("Answer: 5; maybe 6", "5"), ("Answer: 5 as well as 6", "5"),
    ("The answer is 5 apples (or 6, or 7)", "5"), (r"It is 5 or \boxed{6}.", "6"),
    (r"\boxed{2}-\boxed{3}", "3"), ("Answer: 5; perhaps 6", "5"),
    (r"\boxed{\sqrt{8}\times\sqrt{50}}", "20")]
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

HOSTILE = ["(" * 400, r"\frac{1}{" * 90, "9^" * 300 + "9", "9" * 900, "1e999999", "10^{10^{10}}",
           "0^{-1}", r"\sqrt[0]{6}", "().__class__", "\ud800", "\x00", "nan", r"\pm" * 200,
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
@pytest.mark.parametrize("kind, settings", [
    ("granite", BASE | dict(logits_scaling=4.0)), ("cohere", BASE | dict(logit_scale=0.25)),
    ("llama", BASE | dict(rope_parameters=LONGROPE)), ("gpt2", GPT2 | dict(n_positions=40)),
    ("gemma2", HEADS), ("lfm2", BASE | dict(full_attn_idxs=[1], block_multiple_of=8))])
def test_bad_models_are_refused(kind, settings, model_folder, words, tmp_path, error):
    """What cached prompts or the cached sampling would get wrong ends in one line, untrained."""
    assert "--model" in error(words(tmp_path / "run", *LONG, model_folder(kind, settings)))
    assert not (tmp_path / "run/metrics.jsonl").exists()

@pytest.mark.parametrize("missing, unexpected, change, named", [
    (["layers.3.up"], [], lambda weight: None, "layers.3.up"),
    ([], ["layers.0.weight_scale"], lambda weight: None, "weight_scale"),
    ([], [], lambda weight: weight.requires_grad_(False), "norm.weight"),
    ([], [], lambda weight: setattr(weight, "data", weight.data.half()), "norm.weight")])
def test_weights_that_are_not_what_they_seem(missing, unexpected, change, named):
    """Missing, with scales beside them, frozen, in half precision: refused; other keys are not."""
    model = make_model()
    rlep.check_weights(model, [], ["rotary.inv_freq"])
    change(model.model.norm.weight)
    with pytest.raises(UserError, match=named):
        rlep.check_weights(model, missing, unexpected)
    nodes = ast.walk(ast.parse(SOURCE))  # python -O leaves asserts out
    assert not any(isinstance(node, ast.Assert) for node in nodes)

# ---- Run folders: resuming -----------------------------------------------------------------------
def child(words, log, file_limit):
    """In a process of its own: rlep.main, with stderr in a file and a bound on files' size."""
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell may have ignored it
    os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 2)
    if file_limit:
        resource.setrlimit(resource.RLIMIT_FSIZE, (file_limit, file_limit))
    raise SystemExit(main(words))

def start(words, log, file_limit=0):
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
    "vanilla/checkpoint.pt": 0.003, "vanilla/policy": 0.005, "collection/collected.jsonl": 0.03,
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
        assert process.exitcode in (-signal.SIGKILL, 0), (tmp_path / "log").read_text()
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

def leave_partial_files(folder):
    """What a crash in the middle of a save leaves, and a policy that is older."""
    for name in ("checkpoint.pt", "config.json", "summary.json", "policy/stale.bin",
                 "policy.partial/stale.bin"):
        path = folder / (name if "/" in name else f"{name}.partial")
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"half of")
    (folder / "metrics.jsonl").open("a").write('{"step": 6, "accu')

def test_leftovers_of_a_crash_do_no_harm(interrupted, trained, words, tmp_path):
    """Rows behind the checkpoint are made again, not kept twice; half a file or row is ignored."""
    run = shutil.copytree(interrupted, tmp_path / "run")
    leave_partial_files(run)
    assert main(words(run, "--steps", 6, "--save_every", 3)) == 0
    assert result_of(run) == result_of(trained) and not list(run.rglob("*.partial"))

@pytest.mark.parametrize("answered", [0, 1, 3])
def test_collection_goes_on(answered, finished, data, tmp_path, monkeypatch, error):
    """Stopped between batches of four questions: the rest is asked, for the same pool."""
    out, command = tmp_path / "out", ["collect", *RUN, *data]
    command += ["--model", f"{finished}/vanilla/policy", "--out", f"{out}"]
    crash("write_rows", answered + 2, command)  # the first row is the configuration
    assert (out / "collected.jsonl").exists() == (answered > 0)
    assert answered == 0 or "--collect_k" in error([*command, "--collect_k", "30"])
    with spy_on("rollout") as rollout:
        assert main(command) == 0
    asked = [call.args[1] for call in rollout.mock_calls if "seeds" in call.kwargs]
    assert len(sum(asked, [])) == 16 - 4 * answered
    assert (out / "pool.jsonl").read_bytes() == (finished / "pool.jsonl").read_bytes()
    before = snapshot(out)
    monkeypatch.delattr(rlep, "Policy")
    assert main(command) == 0 and snapshot(out) == before  # it is finished: no model is loaded

@pytest.mark.parametrize("command, crashes", [("train", ("train_step", 2)),
                                              ("collect", ("write_rows", 4))])
def test_a_data_file_that_changed(command, crashes, finished, files, tiny, tmp_path, error):
    """Other problems or another pool are refused, under the same flags; another place is not."""
    data, rows = tmp_path / "data.jsonl", read_rows(files / "train.jsonl")
    pool = Path(shutil.copy(finished / "pool.jsonl", tmp_path))
    flags = ["--eval_data", files / "held_out.jsonl", "--out", tmp_path / "out", "--model"]
    flags += [tiny, *TRAIN, "--pool", pool] if command == "train" else [
        finished / "vanilla/policy", *RUN]
    flags = [command, *map(str, flags), "--data"]
    crash(*crashes, [*flags, write_rows(data, rows)])
    before = snapshot(tmp_path / "out")
    for changed in (rows[1:], [{**rows[0], "answer": "8"}, *rows[1:]]):
        assert "file_contents" in error([*flags, write_rows(data, changed)])
    assert snapshot(tmp_path / "out") == before
    assert main([*flags, write_rows(tmp_path / "moved.jsonl", rows)]) == 0
    write_rows(pool, read_rows(pool)[1:])
    assert command == "collect" or "file_contents" in error([*flags, f"{tmp_path}/moved.jsonl"])

def test_flags_that_may_change(interrupted, finished, words, data, tmp_path, monkeypatch, error):
    """Those that bound memory; in `run`, those of phases not yet begun."""
    out = shutil.copytree(interrupted, tmp_path / "a")
    more = ["--sample_rows", 8, "--micro_tokens", 64, "--save_every", 4]
    assert main(words(out, "--steps", 6, *more)) == 0
    assert len(torch.load(out / "checkpoint.pt")["rows"]) == 7  # steps 0 to 6: also the last
    shutil.copytree(finished, tmp_path / "run")
    monkeypatch.chdir(tmp_path)
    command = ["run", *RUN, *data, "--out", "run"]
    for name in ("collection", "rlep"):
        shutil.rmtree(tmp_path / "run" / name)
    with monkeypatch.context() as patch:
        patch.setattr(rlep, "verify", lambda response, gold: False)
        assert "delete it and raise --collect_k" in error(command)
    shutil.rmtree("run/collection")
    command += "--collect_k 33 --collect_temperature 1.9 --replays 1".split()
    assert main(command) == 0
    assert result_of(finished / "vanilla") == result_of(tmp_path / "run/vanilla")
    assert "--replays" in error([*command, "--replays", "3"])  # that phase is finished
    shutil.rmtree(tmp_path / "run/rlep")
    crash("train_step", 1, [*command, "--replays", "3"])  # and now begins

@pytest.mark.parametrize("named, change", [
    ("--learning_rate", 0.5), ("--group_size", 5), ("--clip_high", 0.1), ("--pool", "pool.jsonl"),
    ("--model", "base/policy"), ("checkpoint.pt", cut), ("checkpoint.pt", write("")),
    ("checkpoint.pt", lambda path: torch.save({"step": 3}, path)),
    ("checkpoint.pt", lambda path: torch.save([], path)),
    ("checkpoint.pt", lambda path: torch.save(torch.load(path) | {"rows": 3}, path)),
    ("config.json", cut), ("config.json", write("[" * 50_000))])
def test_other_settings_and_damage(named, change, interrupted, finished, words, tmp_path, error):
    """One line that names the flag or the file; nothing is changed."""
    flags, run = [], shutil.copytree(interrupted, tmp_path / "run")
    if callable(change):
        change(run / named)
    else:
        flags = [named, finished / change if isinstance(change, str) else change]
    before = snapshot(run)
    assert named in error(words(run, "--steps", 6, *flags))
    if named == "checkpoint.pt":  # which is read after the settings have been written again
        before["config.json"] = (run / "config.json").read_bytes()
    assert snapshot(run) == before

def test_second_run_and_ctrl_c(words, tmp_path, error):
    """A folder in use is refused; Ctrl-C ends with one line that says how to go on, status 130."""
    command = words(tmp_path / "run", "--steps", 400)
    process = start(command, tmp_path / "log")
    while process.is_alive() and not (tmp_path / "run/checkpoint.pt").exists():
        time.sleep(0.01)
    assert "another run" in error(command)
    os.kill(process.pid, signal.SIGINT)
    process.join(60)
    log = (tmp_path / "log").read_text()
    assert process.exitcode == 130 and "same command goes on" in log.splitlines()[-1]
    assert "Traceback" not in log

@pytest.mark.parametrize("before, limit", [("interrupted", 1_000_000), ("trained", 100_000)])
def test_full_disk(before, limit, trained, words, tmp_path, request):
    """One line, the checkpoint as it was; with room again it goes on, if only to write a policy."""
    command, skip = words(tmp_path / "run", "--steps", 6), shutil.ignore_patterns("policy")
    shutil.copytree(request.getfixturevalue(before), tmp_path / "run", ignore=skip)
    before = (tmp_path / "run/checkpoint.pt").read_bytes()
    process = start(command, tmp_path / "log", limit)
    process.join(60)
    log = (tmp_path / "log").read_text()
    assert process.exitcode == 2 and "Traceback" not in log, log
    assert "rlep.py: error:" in log.splitlines()[-1]
    assert (tmp_path / "run/checkpoint.pt").read_bytes() == before
    assert main(command) == 0 and result_of(tmp_path / "run") == result_of(trained)

@pytest.mark.parametrize("name, content", [
    ("config.json", b'{"compilerOptions": {"strict": true}}'), ("config.json", b"{}"),
    ("config.json", b"\xff"), ("note", b"mine"), ("", b"a file"), ("", None), ("tiny", None)])
def test_folders_of_others_are_not_touched(name, content, tiny, words, tmp_path, error):
    """A JavaScript project, a file, a folder that is or holds a model: not a byte is changed."""
    out, more = tmp_path / "mine", []
    if content is None:
        more = ["--model", shutil.copytree(tiny, out / name)]
    else:
        (out / name).parent.mkdir(exist_ok=True)
        (out / name).write_bytes(content)
    before = snapshot(tmp_path)
    assert str(out) in error(words(out, *more)) and snapshot(tmp_path) == before

# ---- The command line: bad input -----------------------------------------------------------------
def test_help(capsys):
    """Each flag with its default and its reason; no setting follows the device."""
    with pytest.raises(SystemExit) as end:
        main(["--help"])
    text = capsys.readouterr().out
    assert end.value.code == 0 and "rlep.py collect --model POLICY" in text
    for flag in fields(Config):
        assert re.search(rf"^ +{flag.name}: \w+ = .+  # .{{10,}}", text, re.M)
    config = Config("a", "c", pool="e/f", device="cuda:1", out="runs/train-a-c-f-seed0")
    assert rlep.parse("train --model a --data c --pool e/f --device cuda:1".split())[2] == config

ASK, USER = '{"question": "a?", ', '{"prompt": [{"role": "user"'
BAD_ROWS = {  # what the line must name: the file, and the line in it
    "empty": "", "blank": "\n\n", "one": ASK + '"answer": 2}', "list:1": "[1, 2]\n",
    "torn:3": f'{ASK}"answer": 2}}\n\n{{"q', "array:1": f'[\n{ASK}"answer": 2}}\n]',
    "deep:1": "[" * 50_000, "huge:1": f'{ASK}"answer": {"9" * 5000}}}',
    "latin:1": '{"question": "\udce9", "answer": 1}', "no_question:1": '{"answer": "2"}',
    "surrogate:1": '{"question": "\\ud800", "answer": "2"}', "chat:1": USER + '}], "answer": 1}',
    "no_text:1": USER + ', "content": 5}], "answer": 1}', "no_answer:1": ASK + '"answer": " "}',
    "blank_chat:1": USER + ', "content": " "}], "answer": 1}', "true:1": ASK + '"answer": true}',
    "assistant:1": USER + ', "content": "a"}, {"role": "assistant", "content": "b"}], "answer": 1}',
    "null:1": ASK + '"answer": null, "solution": ""}', "nan:1": ASK + '"answer": NaN}',
    "reward_text:1": ASK + '"reward_model": "7"}', "golds:1": ASK + '"answer": ["4", "2"]}'}
BAD_POOLS = {name: BAD_ROWS[name] for name in ("empty", "deep:1", "reward_text:1")} | {
    "no:1": ASK + '"answer": 2}', "str:1": ASK + '"answer": 2, "reward_model": {"candidates": ""}}',
    "others": '{"question": "a", "answer": 2, "reward_model": {"candidates": ["A: 2"]}}'}
BAD_MODELS = [  # what the line must name, what is done to which file
    ("model", cut, "model.safetensors"), ("tokenizer", Path.unlink, "tokenizer.json"),
    ("no system", write("{{ raise_exception('no system') }}"), "chat_template.jinja"),
    ("empty prompt", write("{% if false %}x{% endif %}"), "chat_template.jinja"),
    ("no end token", edit(eos_token=None), "tokenizer_config.json"),
    ("positions", edit(max_position_embeddings=20), "config.json"),
    ("missing", edit(num_hidden_layers=5), "config.json")]
BAD_FLAGS = [
    "--steps 0", "--group_size 0", "--collect_k 0", "--k 0", "--top_p 0", "--temperature 0",
    "--bf16 -1", "--temperature inf", "--collect_temperature 0", "--learning_rate nan",
    "--learning_rate -1", "--replays -1", "--steps many", "--dual_clip -1", "--dual_clip 0.5",
    "--dual_clip 1", "--device tpu", "--overlong_buffer 25", "--device cuda"]
BAD_WORDS = [
    ("dance", "dance"), ("train now", "plot"), ("plot", "folders"), ("eval", "--model"),
    ("train --no_such_flag 3", "--no_such_flag"), ("collect", "--model"),
    ("run --pool BAD", "--pool"), ("train --pool BAD --replays 0", "--replays"),
    ("eval --model TINY --eval_data BAD", "absent"), ("train --model BAD", "absent"),
    ("train --model TINY --data TRAIN --eval_data TRAIN", "train.jsonl"),
    ("train --model TINY DATA --train_size 17", "--train_size"),
    ("train --model TINY --data BAD", "absent"), ("train --model TINY DATA --pool BAD", "absent")]
BAD = [(words, words.split()[0], None, "") for words in BAD_FLAGS]
BAD += [(words, named, None, "") for words, named in BAD_WORDS]
BAD += [(f"{words} BAD", "folder", Path.mkdir, "") for words in
        ("plot", "train --model", "train --model TINY --data", "train --model TINY DATA --pool")]
BAD += [("train --model TINY --eval_data BAD", "empty", write(""), "")]
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
    if change:
        change(Path(bad, file))
    known = {"BAD": [bad], "TINY": [tiny], "DATA": data, "TRAIN": [data[1]]}
    line = sum([known.get(word, [word]) for word in words.split()], [])
    before = snapshot(".")
    assert named in error([*line, "--max_new_tokens", 24, "--prompts_per_step", 2])
    after = snapshot(".")
    made = [name for name in after.keys() - before.keys() if "/base/initial/" not in name]
    assert {Path(name).name for name in made} <= {"config.json", "lock"}
    assert before.items() <= after.items()

@pytest.mark.parametrize("place", ["response_logprobs", "policy_loss"])
def test_out_of_gpu_memory(place, words, tmp_path, error, monkeypatch):
    """In loading, in the update: a line that names the flags to lower."""
    monkeypatch.setattr(rlep, place, mock.Mock(side_effect=torch.OutOfMemoryError("CUDA")))
    assert "--sample_rows and --micro_tokens" in error(words(tmp_path / "run"))

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
@pytest.mark.parametrize("name, given", [
    ("group_advantages", [torch.tensor([1.0, -1.0]), torch.zeros(2)]),
    ("policy_loss", [torch.zeros(2, 3)] * 2 + [torch.tensor([1.0, 3.0]), torch.ones(2, 3)]),
    ("overlong_penalty", [95, 100, 10]), ("pass_at_k", [[[True, False]], 1]),
    ("rollout", [[[5, 6]], 3]), ("response_logprobs", [[[5, 6]] * 2, [[7, 8], [9]]]),
    ("verify", ["So \\boxed{\\frac{1}{2}\\text{ cm}}", "0.5"])])
def test_copying_a_function_out(name, given, policy):
    """With the imports and what its docstring says it calls, of the verifier its section."""
    wanted, space, options = [name], {}, {}
    parts = re.findall(r"^(?:import|from) .+", SOURCE, re.M)
    while wanted:
        function = getattr(rlep, wanted.pop())
        calls = re.findall(r"Calls ([\w, ]+)", function.__doc__ or "")
        wanted += [word for word in re.findall(r"\w+", " ".join(calls)) if hasattr(rlep, word)]
        parts.append(inspect.getsource(function))
    if name == "verify":
        parts.append(re.search(r"# ---- The verifier.*?(?=# ----.*---\n)", SOURCE, re.S)[0])
    if name in ("rollout", "response_logprobs"):
        given = [policy.model, *given]
    if name == "rollout":
        options = dict(max_new_tokens=5, eos_token_id=1, pad_token_id=0, seeds=[1], top_p=0.9)
    exec("\n".join(parts), space)
    assert str(space[name](*given, **options)) == str(getattr(rlep, name)(*given, **options))

def test_readme_blocks(tmp_path, monkeypatch):
    """The README's Python runs as it stands; the script makes problems that can be read."""
    monkeypatch.chdir(tmp_path)
    rlep.make_base(settings("", warmup_steps=1), Path("runs/run-seed0/vanilla"))
    [block] = re.findall(r"```python\n(.*?)```", (HERE / "README.md").read_text(), re.DOTALL)
    exec(block, {})
    script("arithmetic").main()
    assert len(rlep.load_problems(Config(data="arithmetic.jsonl"))[0]) == 744

def script(name):
    """A module of the scripts that make the README's evidence."""
    return SimpleNamespace(**runpy.run_path(HERE / f".github/{name}.py"))

def test_evidence_table():
    """Means with Student's t, differences paired by seed, the share of steps to the best."""
    evidence = script("evidence")
    assert evidence.interval([1.0, 2.0, 6.0]) == pytest.approx((3.0, 4.30 * 7**0.5 / 3**0.5))
    vanilla = [[0, 0.0], [2, 0.1], [4, 0.3]]
    assert evidence.steps_to_best([[0, 0.0], [2, 0.3], [4, 0.2]], vanilla) == 0.5
    assert evidence.steps_to_best([[0, 0.0], [2, 0.2], [4, 0.2]], vanilla) is None
    curves = {evidence.VANILLA: {3: (0.0, 0.1, 0.2), 4: (0.0, 0.2, 0.4)},
              evidence.RLEP: {4: (0.0, 0.1, 0.3), 3: (0.0, 0.2, 0.5)}}
    arms = {arm: {seed: {"seed": seed, "curve": [[2 * i, share] for i, share in enumerate(curve)],
                         "mean_at_k": curve[-1], "pass_at_k": 0.5, "entropy": 0.25}
                  for seed, curve in seeds.items()} for arm, seeds in curves.items()}
    lines = evidence.table(arms).splitlines()
    assert lines[2].startswith("| vanilla RL | 2 | 30.0 ± 127.")
    assert "| 10.0 ± 254.2 (-10.0 to +30.0) | 0.50 (0.50 to 0.50); 1 of 2 never |" in lines[3]
    assert lines[3].endswith("| 50.0 ± 0.0 | 0.25 ± 0.00 |")
    assert "| 4 | 30.0 | 40.0 | 10.0 ± 254.2 | 1 of 2 |" in evidence.differences(arms)

def test_evidence_of_a_run(finished, data, tmp_path):
    """The supervised control learns the pool; the report of runs draws both pictures."""
    evidence, base = script("evidence"), finished / "base/policy"
    config = rlep.parse(["train", *RUN, *data, "--model", f"{base}", "--pool",
                         f"{finished}/pool.jsonl"])[2]
    evidence.supervise(config, tmp_path / "policy")
    held_out = rlep.load_problems(config)[1]
    row = rlep.evaluate(load(tmp_path / "policy", max_new_tokens=24), held_out, config, "title")
    assert row["mean_at_k"] > read_rows(finished / "rlep/metrics.jsonl")[0]["mean_at_k"] + 0.2
    skip = shutil.ignore_patterns("policy", "*.pt", "initial")
    for folder, place in ((finished, "main"), (finished / "vanilla", "twice")):
        shutil.copytree(folder, tmp_path / "seed0" / place, ignore=skip)
    evidence.main(["report", str(tmp_path)])
    assert "vanilla RL, 48 steps" in (tmp_path / "table.md").read_text()
    evidence.main(["pairs", str(tmp_path / "seed0/main")])
    for picture in ("curves.png", "evidence.png", "seed0/curves.png"):
        assert (tmp_path / picture).read_bytes().startswith(b"\x89PNG")

def test_bench(tiny, tmp_path, capsys, monkeypatch):
    """The benchmark prints what the README's table has."""
    prompts = write_rows(tmp_path / "prompts", [{"prompt": "1*2+3"}, {"prompt": "3*4"}])
    monkeypatch.setattr(rlep, "score", rlep.score)  # the script changes it
    script("bench").main(["--model", str(tiny), "--prompts", prompts, "--max_new_tokens", "8",
                          "--group_size", "4", "--steps", "1"])
    row = json.loads(capsys.readouterr().out)
    assert 1 < row["mean_length"] <= 8 and row["step_tok_s"] < row["sample_tok_s"]
    assert row["peak_mib"] > 100 and row["update_tok_s"] > 0
