"""Tests of rlep.py: the algorithm against slow, obvious implementations, the real path end to end, bad input, crashes.

Nothing is downloaded. Slow things are made once: an untrained model, and one complete small run on problems whose
answer is 7, which RL learns within a few steps.
"""
# SPDX-License-Identifier: MIT
import copy
import gc
import json
import math
import multiprocessing
import os
import random
import shutil
import signal
import time
from collections import Counter
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"  # before transformers is imported: a test that wants the network fails

import numpy as np
import pytest
import torch
from transformers import (AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM,
                          Qwen2Config, Qwen2ForCausalLM)

import rlep
from rlep import Config, ExperiencePool, MasterAdamW, Policy, Problem, extract_answer, main, verify

torch.set_num_threads(1)

# ---- Shared -------------------------------------------------------------------------------------------------------

RUN = ("--threads 1 --warmup_steps 60 --steps 6 --learning_rate 2e-3 --lr_warmup_steps 1 --prompts_per_step 4 "
       "--minibatch_prompts 2 --group_size 16 --max_new_tokens 24 --eval_every 3 --save_every 2 --k 4 --collect_k 32 "
       "--collect_temperature 2 --collect_top_p 1 --sample_rows 64").split()
TRAIN = ("--threads 1 --prompts_per_step 2 --minibatch_prompts 1 --group_size 8 --max_new_tokens 8 --overlong_buffer 7 "
         "--eval_every 3 --save_every 1 --k 2 --seed 1").split()  # the untrained model can learn to be short

def write_rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)

def read_rows(path):
    return [json.loads(line) for line in Path(path).read_text().splitlines()]

def read_json(path):
    return json.loads(path.read_text())

def chat(text):
    return [{"role": "user", "content": text}]

@pytest.fixture(scope="session")
def files(tmp_path_factory):
    """A folder with an untrained model (tiny/) and problems whose answer is 7 (train.jsonl, held_out.jsonl)."""
    folder = tmp_path_factory.mktemp("files")
    rlep.save_random_model(folder / "tiny", seed=0)
    sevens = [p for p in rlep.embedded_problems(400, seed=1) if p.gold == "7"][:24]
    rows = [{"prompt": chat(p.question), "answer": p.gold} for p in sevens]
    write_rows(folder / "train.jsonl", rows[:16])
    write_rows(folder / "held_out.jsonl", rows[16:])
    return folder

@pytest.fixture
def policy(files):
    return Policy(str(files / "tiny"), "cpu")

@pytest.fixture(scope="session")
def data(files):
    return ["--data", str(files / "train.jsonl"), "--eval_data", str(files / "held_out.jsonl")]

@pytest.fixture(scope="session")
def finished(files, data):
    """The folder of a complete, undisturbed run; tests do not change it."""
    assert main(["run", *RUN, *data, "--out", str(files / "run")]) == 0
    gc.collect()  # matplotlib may keep the frame of run, and with it the folder's lock
    return files / "run"

@pytest.fixture(scope="session")
def trained(files, data):
    """The folder of a complete, undisturbed train of 6 steps; tests do not change it."""
    assert main(train_words(files, data, files / "trained", "--steps", "6")) == 0
    assert all(row["trained_tokens"] > 0 for row in read_rows(files / "trained/metrics.jsonl")[1:])
    return files / "trained"

def train_words(files, data, out, *more):
    return ["train", *TRAIN, *data, "--model", str(files / "tiny"), "--out", str(out), *more]

def result_of(folder):
    """What a run must leave, whatever happened on the way: policies byte by byte, pool, and metrics without timings."""
    content = {}
    for path in sorted(p for p in Path(folder).rglob("*") if p.is_file()):
        name = str(path.relative_to(folder))
        if "policy/" in name or name == "pool.jsonl":
            content[name] = path.read_bytes()
        elif name.endswith("metrics.jsonl"):
            content[name] = [{k: v for k, v in row.items() if not k.endswith("_s") and not k.startswith("peak_")}
                             for row in read_rows(path)]
    return content

def snapshot(folder):
    return {str(p): p.read_bytes() for p in Path(folder).rglob("*") if p.is_file() and p.name != ".lock"}

def make_model(kind="llama", attention="sdpa", vocabulary=40, **settings):
    """A random model with sharp predictions, so that a wrong position or mask shows."""
    torch.manual_seed(0)
    settings = dict(vocab_size=vocabulary, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
                    num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=256, initializer_range=0.25,
                    pad_token_id=0, eos_token_id=1, bos_token_id=None) | settings
    model = LlamaForCausalLM(LlamaConfig(**settings)) if kind == "llama" else Qwen2ForCausalLM(Qwen2Config(**settings))
    model.set_attn_implementation(attention)
    return model.eval()

def random_tokens(rng, *lengths, vocabulary=40):
    return [[rng.randrange(2, vocabulary) for _ in range(length)] for length in lengths]

def slow_logprobs(model, prompt, response, temperature=1.0):
    """One answer, alone and unpadded, through the model's own logits."""
    logits = model(torch.tensor([prompt + response])).logits[0, len(prompt) - 1:-1] / temperature
    return logits.log_softmax(-1)[range(len(response)), response]

def slow_loss(logprobs, old, advantages, lengths, low=0.2, high=0.28, dual=10.0):
    """Eq. 3 and 4, token by token: the sum of the losses, not yet divided by the number of tokens."""
    total = 0.0
    for i, length in enumerate(lengths):
        for t in range(length):
            ratio, advantage = (logprobs[i][t] - old[i][t]).exp(), float(advantages[i])
            value = min(ratio * advantage, min(max(ratio, 1 - low), 1 + high) * advantage)
            if dual and advantage < 0:
                value = max(value, dual * advantage)
            total = total - value
    return total

def gradients(model):
    return torch.cat([p.grad.flatten().double() for p in model.parameters()])

def relative(a, b):
    return float((a - b).norm() / b.norm())

# ---- Rewards, advantages, loss ------------------------------------------------------------------------------------

def test_advantages_by_hand():
    """The paper's point: two replayed successes beside 16 failures get +2.75, the failures -0.34."""
    rewards = torch.tensor([-1.0] * 16 + [1.0] * 2)
    advantages = rlep.group_advantages(rewards, torch.zeros(18, dtype=torch.long))
    assert advantages[:16].tolist() == pytest.approx([-0.3436] * 16, abs=1e-4)
    assert advantages[16:].tolist() == pytest.approx([2.7487] * 2, abs=1e-4)
    mixed = rlep.group_advantages(torch.tensor([3.0, 1.0, 0.0, 2.0, 5.0]), torch.tensor([7, 2, 7, 2, 4]))
    half = math.sqrt(0.5)  # (3 - 1.5) / std of (3, 0); (1 - 1.5) / std of (1, 2); a group of one: mean 0, std 1
    assert mixed.tolist() == pytest.approx([half, -half, -half, half, 5.0], abs=2e-5)

@pytest.mark.parametrize("reward", [1.0, -1.0, 0.1, 1 / 3, 1e-8, 12345.678])
def test_equal_rewards_give_exactly_zero(reward):
    """The rounding of a mean must not be blown up into an advantage; a group of one does not count as equal."""
    for size in (2, 3, 7, 18):
        advantages = rlep.group_advantages(torch.full((size,), reward), torch.zeros(size, dtype=torch.long))
        assert advantages.tolist() == [0.0] * size
    assert rlep.group_advantages(torch.tensor([reward]), torch.tensor([3])).item() == pytest.approx(reward, rel=1e-5)

def test_advantages_against_a_slow_loop():
    """Groups of any size, interleaved, ids in any order."""
    rng = random.Random(0)
    ids = [rng.choice([11, 5, 8, 2]) for _ in range(60)] + [99]
    rewards = [rng.choice([-1.0, 1.0, 0.25, -1.7]) for _ in ids]
    expected = []
    for reward, group in zip(rewards, ids):
        own = [r for r, g in zip(rewards, ids) if g == group]
        mean = sum(own) / len(own) if len(own) > 1 else 0.0
        std = math.sqrt(sum((r - mean) ** 2 for r in own) / (len(own) - 1)) if len(own) > 1 else 1.0
        expected.append((reward - mean) / (std + 1e-6))
    assert rlep.group_advantages(torch.tensor(rewards), torch.tensor(ids)).tolist() == pytest.approx(expected, abs=1e-5)

def test_overlong_penalty():
    """Nothing up to limit - buffer, -factor at the limit, a straight line between; no buffer, no penalty."""
    penalties = [rlep.overlong_penalty(length, 100, 20) for length in (1, 80, 81, 90, 100)]
    assert penalties == pytest.approx([0, 0, -0.05, -0.5, -1])
    assert rlep.overlong_penalty(95, 100, 20, factor=0.5) == pytest.approx(-0.375)
    assert rlep.overlong_penalty(100, 100, 0) == 0

@pytest.mark.parametrize("ratio, advantage, dual, objective, slope, clip", [
    (1.0, 2.0, 10.0, 2.0, 2.0, None), (1.27, 1.0, 10.0, 1.27, 1.27, None), (1.5, 1.0, 10.0, 1.28, 0.0, "clip_high"),
    (0.5, 1.0, 10.0, 0.5, 0.5, None), (1.5, -1.0, 10.0, -1.5, -1.5, None), (0.5, -1.0, 10.0, -0.8, 0.0, "clip_low"),
    (20.0, -1.0, 10.0, -10.0, 0.0, "dual_clip"), (20.0, -1.0, None, -20.0, -20.0, None),
    (20.0, -3.0, 4.0, -12.0, 0.0, "dual_clip"), (20.0, 1.0, 10.0, 1.28, 0.0, "clip_high")])
def test_loss_of_one_token(ratio, advantage, dual, objective, slope, clip):
    """Each side of each clip: the value, the gradient (none where clipped), and which clip is counted."""
    logprob = torch.tensor([[math.log(ratio) - 1.0, 5.0]], dtype=torch.float64, requires_grad=True)
    loss, stats = rlep.policy_loss(logprob, torch.tensor([[-1.0, -5.0]]).double(), torch.tensor([advantage]).double(),
                                   torch.tensor([[True, False]]), dual_clip=dual)
    loss.backward()
    assert loss.item() == pytest.approx(-objective) and logprob.grad[0].tolist() == pytest.approx([-slope, 0.0])
    counted = {name: share for name, share in stats.items() if name != "ratio_max"}
    assert counted == {name: float(name == clip) for name in ("clip_low", "clip_high", "dual_clip")}
    assert stats["ratio_max"] == pytest.approx(max(1.0, ratio))

@pytest.mark.parametrize("dual", [None, 2.0, 10.0])
def test_loss_against_a_slow_loop(dual):
    """Value and gradient on random numbers, for a whole mini-batch and for one micro-batch of it (num_tokens)."""
    torch.manual_seed(1)
    lengths = [5, 1, 9, 7, 3, 9]
    mask = torch.arange(9) < torch.tensor(lengths)[:, None]
    old, advantages = -torch.rand(6, 9, dtype=torch.float64), torch.randn(6, dtype=torch.float64)
    start = old + 1.5 * torch.randn(6, 9, dtype=torch.float64)
    start[~mask] = math.nan  # what lies outside the mask must not matter
    for num_tokens in (None, 100):
        ours, slow = start.clone().requires_grad_(), start.clone().requires_grad_()
        loss, stats = rlep.policy_loss(ours, old, advantages, mask, 0.1, 0.3, dual, num_tokens)
        expected = slow_loss(slow, old, advantages, lengths, 0.1, 0.3, dual) / (num_tokens or sum(lengths))
        loss.backward(), expected.backward()
        assert loss.item() == pytest.approx(expected.item(), rel=1e-12)
        assert torch.allclose(ours.grad[mask], slow.grad[mask], rtol=1e-12) and ours.grad[~mask].abs().sum() == 0
        assert stats["ratio_max"] == pytest.approx((start - old)[mask].max().exp().item())

# ---- Log-probabilities and gradients ------------------------------------------------------------------------------

def mini_batch(vocabulary=40, seed=0):
    """Three groups of four answers: prompts shared within a group, lengths from 1 on; the last group's twice alike."""
    rng = random.Random(seed)
    prompts = [p for p in random_tokens(rng, 3, 9, 1, vocabulary=vocabulary) for _ in range(4)]
    return prompts, random_tokens(rng, 5, 1, 12, 7, 3, 3, 1, 16, 2, 8, 11, 4, vocabulary=vocabulary)

@pytest.mark.parametrize("kind, vocabulary, settings, row_tokens, temperature", [
    ("llama", 40, {}, 512, 1.0), ("llama", 40, {}, 20, 0.7), ("llama", 40, {"num_key_value_heads": 4}, 1, 1.0),
    ("qwen2", 40, {}, 512, 1.3), ("qwen2", 300_000, {"hidden_size": 8, "tie_word_embeddings": True}, 30, 1.0)])
def test_logprobs_equal_one_by_one(kind, vocabulary, settings, row_tokens, temperature):
    """Packing, shared prompts and chunks of logits (64 tokens at 300,000 words) change no log-prob and no gradient."""
    model = make_model(kind, "sdpa", vocabulary, **settings)
    prompts, responses = mini_batch(vocabulary)
    order = range(len(prompts)) if row_tokens > 20 else [3, 8, 0, 1, 9, 2, 4, 5, 11, 10, 6, 7]  # some prompts alone
    prompts, responses = [prompts[i] for i in order], [responses[i] for i in order]
    logprobs, mask = rlep.response_logprobs(model, prompts, responses, temperature=temperature, row_tokens=row_tokens)
    assert mask.sum(1).tolist() == [len(r) for r in responses] and logprobs[~mask].abs().sum() == 0
    slow = torch.cat([slow_logprobs(model, p, r, temperature) for p, r in zip(prompts, responses)])
    assert torch.allclose(logprobs[mask], slow, atol=2e-5)
    weights = torch.linspace(-1, 2, len(slow))
    (logprobs[mask] * weights).sum().backward()
    ours = gradients(model)
    model.zero_grad()
    (slow * weights).sum().backward()
    assert relative(ours, gradients(model)) < 1e-5

@pytest.fixture(scope="module")
def naive():
    """A mini-batch with clipping active, and its gradient by one answer at a time in float64."""
    model, (prompts, responses) = make_model("llama"), mini_batch()
    torch.manual_seed(2)
    advantages = torch.randn(12)
    advantages[[1, 4, 5, 6, 7]] = 0.0  # among them a whole group
    old, mask = rlep.all_logprobs(model, prompts, responses, 50)
    old = old + 0.5 * torch.randn_like(old) * mask
    double = copy.deepcopy(model).double()
    slow = [slow_logprobs(double, p, r) for p, r in zip(prompts, responses)]
    loss = slow_loss(slow, old.double(), advantages.double(), list(map(len, responses))) / sum(map(len, responses))
    loss.backward()
    return model, prompts, responses, advantages, old, loss.item(), gradients(double)

@pytest.mark.parametrize("micro_tokens", [1, 17, 40, 100_000])
def test_gradient_does_not_depend_on_micro_batches(naive, micro_tokens, monkeypatch):
    """One mean over the tokens of the whole mini-batch; answers of advantage 0 cost no pass but count in the mean."""
    model, prompts, responses, advantages, old, loss, gradient = naive
    real, seen = rlep.response_logprobs, []

    def spy(model, prompts, responses, **options):
        seen.extend(map(tuple, responses))
        return real(model, prompts, responses, **options)

    monkeypatch.setattr(rlep, "response_logprobs", spy)
    model.zero_grad()
    stats = rlep.accumulate_gradients(model, prompts, responses, advantages, old, micro_tokens)
    assert relative(gradients(model), gradient) < 1e-5 and stats["loss"] == pytest.approx(loss, abs=1e-6)
    assert Counter(seen) == Counter(tuple(r) for r, a in zip(responses, advantages.tolist()) if a)
    assert stats["clip_low"] > 0 and stats["clip_high"] > 0 and stats["ratio_max"] > 1.28

def test_micro_batches_hold_everything_once_within_bounds():
    """No answer is lost or counted twice, and no micro-batch is larger than allowed, padding included."""
    (prompts, responses), model = mini_batch(), make_model()
    for limit in (1, 30, 60, 10_000):
        batches = list(rlep.micro_batches(model, prompts, responses, limit))
        assert sorted(i for batch, _ in batches for i in batch) == list(range(12))
        for batch, part in batches:
            assert part["prompts"] == [prompts[i] for i in batch] and part["responses"] == [responses[i] for i in batch]
            rows = rlep.pack_rows(**part)
            lengths = [len(part["prompts"][row[0]]) + sum(len(part["responses"][j]) for j in row) for row in rows]
            assert len(rows) == 1 or len(rows) * max(lengths) <= limit
    assert len(list(rlep.micro_batches(model, prompts, responses, 10_000))) == 1

def test_without_old_logprobs_ratios_are_one(naive):
    """The first update of a rollout: old log-probs None means the same as those of the current policy."""
    model, prompts, responses, advantages = naive[:4]
    results = []
    for old in (None, rlep.all_logprobs(model, prompts, responses, 64)[0]):
        model.zero_grad()
        stats = rlep.accumulate_gradients(model, prompts, responses, advantages, old, 64)
        results.append(gradients(model))
        assert stats["ratio_max"] == pytest.approx(1, abs=1e-4) and stats["clip_low"] == stats["clip_high"] == 0
    assert relative(*results) < 1e-4

def test_dropout_is_switched_off(tmp_path, files):
    """With dropout the policy would differ from the one that sampled, even before the first update."""
    shutil.copytree(files / "tiny", tmp_path / "model")
    config = read_json(tmp_path / "model/config.json") | {"attention_dropout": 0.5}
    (tmp_path / "model/config.json").write_text(json.dumps(config))
    model = Policy(str(tmp_path / "model"), "cpu").model.train()
    prompts, responses = mini_batch(20)
    passes = [rlep.response_logprobs(model, prompts, responses)[0] for _ in range(2)]
    assert torch.equal(*passes)

def test_gradient_checkpointing_changes_no_gradient(files):
    """Less memory, the same result."""
    found = []
    for checkpointing in (False, True):
        model = Policy(str(files / "tiny"), "cpu", checkpointing).model
        prompts, responses = mini_batch(20)
        rlep.accumulate_gradients(model, prompts, responses, torch.linspace(-1, 1, 12), None, 64)
        found.append(gradients(model))
        assert model.is_gradient_checkpointing == checkpointing
    assert relative(*found) < 1e-6

# ---- Sampling -----------------------------------------------------------------------------------------------------

def roll(model, prompts, group_size, limit=40, seed=0, ends=1, **options):
    options = dict(max_new_tokens=limit, eos_token_id=ends, pad_token_id=0) | options
    return rlep.rollout(model, prompts, group_size, generator=torch.Generator().manual_seed(seed), **options)

@torch.no_grad()
def slow_rollout(model, prompts, group_size, limit, seed, ends, temperature, top_p):
    """One answer at a time without a cache, from the same uniform numbers."""
    generator = torch.Generator().manual_seed(seed)
    uniforms = [torch.rand(len(prompts) * group_size, generator=generator) for _ in range(limit)]
    answers = []
    for row in range(len(prompts) * group_size):
        ids = list(prompts[row // group_size])
        for t in range(limit):
            logits = model(torch.tensor([ids])).logits[:, -1]
            ids.append(rlep.sample_tokens(logits, uniforms[t][row:row + 1], temperature, top_p).item())
            if ids[-1] in ends:
                break
        answers.append(ids[len(prompts[row // group_size]):])
    return [answers[i:i + group_size] for i in range(0, len(answers), group_size)]

@pytest.mark.parametrize("kind, attention", [("llama", "sdpa"), ("llama", "eager"), ("qwen2", "sdpa")])
@pytest.mark.parametrize("temperature, top_p, ends, every", [(1.0, 1.0, [1], None), (1.0, 1.0, [1], 8),
                                                             (1.5, 0.9, [1, 5, 9], None)])
def test_rollout_equals_a_slow_loop(kind, attention, temperature, top_p, ends, every):
    """Padding, copies of the cache, its pages of 16 columns and their merging at 64, retired rows, several end tokens, the
    limit."""
    model = make_model(kind, attention, initializer_range=0.15)
    prompts = random_tokens(random.Random(3), 4, 1, 11)
    answers = roll(model, prompts, 4, 75, 5, ends, temperature=temperature, top_p=top_p, retire_every=every)
    assert answers == slow_rollout(model, prompts, 4, 75, 5, ends, temperature, top_p)
    flat = [answer for group in answers for answer in group]
    assert len({tuple(answer) for answer in flat}) > 6 and len(set(map(len, flat))) > 3  # not a trivial case
    assert all(answer[-1] in ends or len(answer) == 75 for answer in flat)
    assert all(token not in ends for answer in flat for token in answer[:-1])
    assert any(answer[-1] in ends for answer in flat) and max(map(len, flat)) > (64 if ends == [1] else 16)

@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_greedy_equals_generate(attention):
    """Every member of a group is what transformers' generate gives for its prompt alone, up to 130 tokens."""
    model = make_model("qwen2", attention)
    prompts = random_tokens(random.Random(4), 2, 13, 6)
    for prompt, group in zip(prompts, roll(model, prompts, 3, 130, temperature=0)):
        expected = model.generate(torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
                                  do_sample=False, max_new_tokens=130)[0, len(prompt):].tolist()
        assert group == [expected] * 3

def test_sampling_repeats_and_ignores_neighbours():
    """The same generator state, the same tokens; another seed, others; a longer neighbour (padding) changes nothing."""
    model, rng = make_model(), random.Random(5)
    prompt, short, long = random_tokens(rng, 4, 2, 25)
    first = roll(model, [prompt, short], 4, 20)
    assert first == roll(model, [prompt, short], 4, 20) != roll(model, [prompt, short], 4, 20, seed=1)
    assert first[0] == roll(model, [prompt, long], 4, 20)[0]
    assert len({tuple(answer) for answer in first[0]}) > 1
    assert roll(model, [prompt], 1, 20, temperature=0)[0] == roll(model, [prompt, long], 1, 20, temperature=0)[0]

def test_rollout_leaves_the_attention_as_it_was(monkeypatch):
    """Also when it is interrupted: training goes on with the model's own attention."""
    model = make_model(attention="eager")
    roll(model, [[2, 3]], 2)
    assert model.config._attn_implementation == "eager"
    monkeypatch.setattr(rlep, "sample_tokens", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        roll(model, [[2, 3]], 2)
    assert model.config._attn_implementation == "eager"

def chi_square(counts, probabilities):
    """Squared deviations over expectation: about as large as the number of values where the draws are right."""
    expected = probabilities * counts.sum()
    used = expected > 0
    assert counts[~used].sum() == 0
    return float(((counts[used] - expected[used]) ** 2 / expected[used]).sum())

@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_sampled_frequencies(temperature):
    """20,000 first tokens follow the model's probabilities at the temperature asked for."""
    model, prompt = make_model(vocabulary=12, initializer_range=0.4), [3, 7, 5]
    tokens = [answer[0] for answer in roll(model, [prompt], 20_000, 1, temperature=temperature)[0]]
    with torch.no_grad():
        probabilities = (model(torch.tensor([prompt])).logits[0, -1] / temperature).softmax(-1).double().numpy()
    assert chi_square(np.bincount(tokens, minlength=12), probabilities) < 31  # 11 degrees of freedom: chance 0.001

@pytest.mark.parametrize("top_p, kept", [
    (0.45, [3]), (0.55, [3, 0]), (0.85, [3, 0, 2]), (0.96, [3, 0, 2, 4]), (1, [3, 0, 2, 4])])
def test_top_p_keeps_the_smallest_set(top_p, kept):
    """Exactly the fewest tokens that reach top_p, at their own odds; a token of probability 0 never."""
    probabilities = torch.tensor([0.3, 0.0, 0.15, 0.5, 0.05, 0.0])
    uniform = torch.cat([torch.arange(10_000) / 10_000, torch.tensor([1 - 2.0**-24])])
    tokens = rlep.sample_tokens(probabilities.log().expand(len(uniform), -1), uniform, 1.0, top_p)
    shares = np.bincount(tokens, minlength=6) / len(uniform)
    expected = np.array([probabilities[i] if i in kept else 0 for i in range(6)])
    assert shares == pytest.approx(expected / expected.sum(), abs=3e-4)
    assert set(tokens.tolist()) == set(kept)

def test_extreme_uniform_numbers():
    """0 and 1 - 2^-24, the ends of torch.rand, draw possible tokens only, wherever the impossible ones stand."""
    for possible in ([2], [0, 5], [1, 3], [0, 1, 2, 3, 4, 5]):
        logits = torch.full((3, 6), -math.inf)
        logits[:, possible] = torch.randn(len(possible), generator=torch.Generator().manual_seed(0))
        for top_p in (1.0, 0.9):
            tokens = rlep.sample_tokens(logits, torch.tensor([0.0, 0.5, 1 - 2.0**-24]), 1.0, top_p).tolist()
            assert set(tokens) <= set(possible)
    assert rlep.sample_tokens(torch.tensor([[0.0, 3.0, 1.0]]), torch.zeros(1), 0, 1.0).item() == 1  # greedy

def test_a_broken_model_still_gives_tokens():
    """With weights that are not finite, sampling must not leave the vocabulary: training then reports what happened."""
    assert rlep.sample_tokens(torch.full((3, 6), math.nan), torch.tensor([0.0, 0.5, 0.9]), 1.0, 1.0).max() < 6

def test_logprobs_of_sampled_tokens_equal_the_training_pass(policy):
    """What was sampled is what is trained: log-probs of a rollout, packed, equal those of a plain forward pass."""
    prompts = [policy.prompt(problem) for problem in rlep.embedded_problems(3, 0)]
    groups = roll(policy.model, prompts, 4, 30, ends=policy.ends)
    prompts = [prompt for prompt in prompts for _ in range(4)]
    responses = [answer for group in groups for answer in group]
    logprobs, mask = rlep.all_logprobs(policy.model, prompts, responses, 200)
    with torch.no_grad():
        slow = torch.cat([slow_logprobs(policy.model, p, r) for p, r in zip(prompts, responses)])
    assert torch.allclose(logprobs[mask], slow, atol=1e-5)

# ---- Optimizer and update -----------------------------------------------------------------------------------------

class Weights(torch.nn.Module):
    def __init__(self, dtype, size=4):
        super().__init__()
        self.w = torch.nn.Parameter(torch.ones(size, dtype=dtype))

def test_small_updates_are_not_lost_in_bf16():
    """2,500 updates of 1e-6 relative: plain AdamW on bf16 weights stands still, the fp32 master copy adds them up."""
    ours, plain = Weights(torch.bfloat16), Weights(torch.bfloat16)
    optimizer, adam = MasterAdamW(ours, weight_decay=0.0), torch.optim.AdamW(plain.parameters(), 1e-6, weight_decay=0)
    for step in range(2500):
        ours.w.sum().backward()
        optimizer.step(1e-6, 10.0)
        if step == 0:
            assert optimizer.masters[0][0] == pytest.approx(1 - 1e-6, abs=1e-7) and ours.w.tolist() == [1.0] * 4
        plain.w.sum().backward()
        adam.step(), adam.zero_grad()
    assert plain.w.tolist() == [1.0] * 4
    assert ours.w.dtype == torch.bfloat16 and ours.w.tolist() == [0.99609375] * 4  # the next bf16 number below 1
    assert optimizer.masters[0].dtype == torch.float32

def test_fp32_steps_equal_torch_adamw():
    """Same numbers as clip_grad_norm_ and torch.optim.AdamW, gradients adding up over several backward passes."""
    torch.manual_seed(0)
    ours, plain = Weights(torch.float32, 6), Weights(torch.float32, 6)
    optimizer, adam = MasterAdamW(ours, weight_decay=0.1), torch.optim.AdamW(plain.parameters(), 0.01, weight_decay=0.1)
    for scale in (0.1, 5.0, 0.3, 2.0):
        parts = torch.randn(2, 6) * scale
        for model in (ours, plain):
            for part in parts:
                (model.w * part).sum().backward()
        norm = torch.nn.utils.clip_grad_norm_(plain.parameters(), 1.0)
        adam.step(), adam.zero_grad()
        assert optimizer.step(0.01, 1.0) == pytest.approx(norm.item()) == parts.sum(0).norm().item()
        assert torch.equal(ours.w, plain.w) and ours.w.grad is None

@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_no_step_on_a_non_finite_gradient(bad):
    """Such a step would destroy the weights for good: it is not taken, and leaves no trace in the optimizer."""
    model = Weights(torch.float32)
    optimizer = MasterAdamW(model)
    (model.w * torch.tensor([1.0, bad, 1.0, 1.0])).sum().backward()
    assert optimizer.step(0.1, 1.0) is None and model.w.tolist() == [1.0] * 4 and not optimizer.adam.state
    model.w.sum().backward()
    assert optimizer.step(0.1, 1.0) == 2.0 and model.w.tolist() != [1.0] * 4

def update(policy, micro_tokens, advantages=None):
    """One update on 12 answers. Returns the statistics, the weights and the memory setting afterwards."""
    prompts, responses = mini_batch(20)
    memory = {"micro_tokens": micro_tokens}
    advantages = torch.linspace(-1, 1, 12) if advantages is None else advantages
    stats = rlep.update_policy(policy.model, MasterAdamW(policy.model), prompts, responses, advantages, None, memory,
                               learning_rate=1e-3)
    return stats, torch.cat([p.detach().flatten() for p in policy.model.parameters()]), memory["micro_tokens"]

def test_out_of_gpu_memory_halves_the_micro_batch(files, monkeypatch, capsys):
    """The mini-batch starts again with half: same result as with that from the start, and one line says so."""
    def fresh():
        return Policy(str(files / "tiny"), "cpu")

    _, half, _ = update(fresh(), 32)
    real, calls = rlep.response_logprobs, []

    def fails_once(*args, **options):
        calls.append(1)
        if len(calls) == 2:  # when the first micro-batch has left its gradient
            raise torch.cuda.OutOfMemoryError("CUDA out of memory")
        return real(*args, **options)

    monkeypatch.setattr(rlep, "response_logprobs", fails_once)
    stats, weights, left = update(fresh(), 64)
    assert torch.equal(weights, half) and left == 32 and not stats["skipped"]
    printed = "".join(capsys.readouterr())
    assert printed.count("out of GPU memory") == 1 and "--micro_tokens 32" in printed

    def always_fails(*args, **options):
        raise torch.cuda.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(rlep, "response_logprobs", always_fails)
    with pytest.raises(rlep.UserError, match="--gradient_checkpointing"):
        update(fresh(), 64)

def test_groups_that_teach_nothing_change_nothing(policy):
    """All advantages 0: no gradient, no step, and that is no failure."""
    before = [p.detach().clone() for p in policy.model.parameters()]
    stats, _, _ = update(policy, 96, torch.zeros(12))
    assert stats["loss"] == 0 and stats["skipped"] == 0
    assert all(map(torch.equal, before, policy.model.parameters()))

# ---- Experience pool ----------------------------------------------------------------------------------------------

def test_pool_takes_verified_and_new_answers_only():
    """What the policy is to imitate must be right, and an answer given twice counts once."""
    pool = ExperiencePool()
    assert pool.add("1+1?", "2", "It is \\boxed{2}") and pool.add("1+1?", "2", "Clearly \\boxed{2}")
    assert not pool.add("1+1?", "2", "It is \\boxed{2}") and not pool.add("1+1?", "2", "It is \\boxed{3}")
    assert not pool.add("1+2?", "3", "\\boxed{2}") and not pool.add("1+2?", "3", "")
    assert len(pool) == 2 and pool.questions() == ["1+1?"]

def test_draw():
    """At most M, never the same twice, the same for the same generator, every answer equally likely; none for none."""
    pool, answers = ExperiencePool(), [f"{'so ' * i}\\boxed{{2}}" for i in range(5)]
    assert all(pool.add("q", "2", answer) for answer in answers)
    counts = Counter()
    for seed in range(1000):
        drawn = pool.draw("q", 2, random.Random(seed))
        assert len(set(drawn)) == 2 and drawn == pool.draw("q", 2, random.Random(seed))
        counts.update(drawn)
    assert set(counts) == set(answers) and min(counts.values()) > 320
    assert sorted(pool.draw("q", 9, random.Random(0))) == sorted(answers) and not pool.draw("r", 2, random.Random(0))

def test_pool_round_trip(tmp_path):
    """Through disk and back: the row format of the authors' verl recipe, the chat before a question kept."""
    pool, system = ExperiencePool(), ({"role": "system", "content": "Think."},)
    texts = ["a \\boxed{2}", "zwei: \\boxed{2}\nüber \"alles\""]
    assert all(pool.add("1+1?", "2", text, system) for text in texts) and pool.add("2+2?", "4", "\\boxed{4}")
    pool.save(tmp_path / "pool.jsonl")
    row, other = read_rows(tmp_path / "pool.jsonl")
    assert row["prompt"] == [*system, *chat("1+1?")] and other["prompt"] == chat("2+2?")
    assert row["reward_model"] == {"ground_truth": "2", "style": "rule", "candidates": texts} and "data_source" in row
    again = ExperiencePool.load(tmp_path / "pool.jsonl")
    assert (again.answers, again.problems) == (pool.answers, pool.problems)
    again.save(tmp_path / "again.jsonl")
    assert (tmp_path / "again.jsonl").read_bytes() == (tmp_path / "pool.jsonl").read_bytes()

def authors_row(question, gold, *candidates):
    return {"data_source": "math", "prompt": chat(question), "ability": "MATH", "extra_info": {"index": 0},
            "reward_model": {"ground_truth": gold, "style": "rule", "candidates": list(candidates)}}

def test_load_verifies_again_and_keep_for_counts(tmp_path):
    """Wrong, double and too long answers, and those to other questions, are left out and counted."""
    path = write_rows(tmp_path / "pool.jsonl", [
        authors_row("a", "2", "\\boxed{2}", "\\boxed{3}", "\\boxed{2}", "a long way to \\boxed{2}"),
        authors_row("b", "4", "\\boxed{4}", "so \\boxed{4}"), authors_row("c", "5", "at long last \\boxed{5}")])
    pool, failed = ExperiencePool.load(path), ExperiencePool.load(path, failed=True)
    assert len(pool) == 5 and pool.left_out.total() == 2 and failed.answers == {"a": ["\\boxed{3}"]}
    problems = [Problem("a", "2"), Problem("c", "5"), Problem("d", "6")]
    assert pool.keep_for(problems, lambda text: len(text) < 12) == problems[:1]
    assert pool.answers["a"] == ["\\boxed{2}"] and pool.questions() == ["a"] and len(pool) == 1
    assert sorted(pool.left_out.values()) == [2, 2, 2]

# ---- Data and prompts ---------------------------------------------------------------------------------------------

@pytest.mark.parametrize("row, question, gold", [
    ({"question": "How many?", "answer": "He has <<6*7=42>>42.\n#### 42"}, "How many?\nBox it.", "42"),  # GSM8K
    ({"problem": "Find $x$.", "level": "Level 5", "solution": "First \\boxed{1}? No: $x=\\boxed{\\frac{1}{2}}$."},
     "Find $x$.\nBox it.", "\\frac{1}{2}"),  # MATH
    ({"prompt": chat("Solve."), "reward_model": {"ground_truth": "34", "style": "rule"}}, "Solve.", "34"),  # DAPO
    ({"id": 60, "problem": "Aya walks", "solution": "\\boxed{9}", "answer": "204", "question": "Aya walks"},
     "Aya walks\nBox it.", "204"),  # AIME
    ({"id": 0, "question": "Cities", "answer": 27.0}, "Cities\nBox it.", "27"),  # AMC
    ({"question": "q", "answer": 0}, "q\nBox it.", "0"), ({"question": "q", "ground_truth": ["7"]}, "q\nBox it.", "7"),
    ({"question": "q", "answer": 2.5}, "q\nBox it.", "2.5"), (authors_row("r", "3", "\\boxed{3}"), "r", "3")])
def test_rows_as_published(row, question, gold):
    """GSM8K, MATH, DAPO, AIME, AMC and RLEP rows; the instruction joins plain text, not a chat, which has its own."""
    assert rlep.row_to_problem(row, "f:1", "Box it.") == Problem(question, gold)

def test_chat_and_prompts(policy, files, tmp_path):
    """Messages before the question reach the template; a model without template gets Question: ... Answer:."""
    row = {"prompt": [{"role": "system", "content": "1+"}, *chat("2=")], "answer": "3"}
    problem = rlep.row_to_problem(row, "f:1")
    policy.tokenizer.chat_template = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    assert problem == Problem("2=", "3", ({"role": "system", "content": "1+"},))
    assert policy.prompt(problem) == policy.tokenizer("1+2=").input_ids
    tokens = policy.tokens("7*3=1")
    assert tokens == policy.tokenizer("7*3=1").input_ids + [1] and policy.text(tokens) == "7*3=1"
    plain = Policy(str(plain_model(files, tmp_path)), "cpu")
    assert plain.prompt(problem) == policy.tokenizer("Question: 2=\nAnswer:").input_ids

def plain_model(files, tmp_path):
    """A local model folder without a chat template."""
    shutil.copytree(files / "tiny", tmp_path / "plain", ignore=lambda *_: ["chat_template.jinja"])
    return tmp_path / "plain"

def test_training_and_held_out_problems(tmp_path):
    """Sizes as asked for, no question in both parts or twice; embedded golds and noiseless workings are right."""
    rows = [{"question": f"q{i % 30}", "answer": i % 30} for i in range(40)]
    path = write_rows(tmp_path / "data.jsonl", rows)
    train, held_out = rlep.load_problems(Config(data=path, eval_size=8, train_size=15, instruction=""))
    assert [p.gold for p in train + held_out] == [str(i) for i in [*range(15), *range(22, 30)]]
    train, held_out = rlep.load_problems(Config(train_size=300, eval_size=50))
    assert (len(train), len(held_out), len({p.question for p in train + held_out})) == (300, 50, 350)
    for problem in train:
        assert eval(problem.question.split(" ")[0]) % 10 == int(problem.gold)
        assert rlep.verify(rlep.write_working(problem.question, random.Random(0), noise=0), problem.gold)

# ---- Evaluation and data order ------------------------------------------------------------------------------------

def test_evaluation_metrics_by_hand():
    """mean@k with its interval over questions, pass@k (unbiased), maj@k with ties and missing answers."""
    correct = [[True, False, False, False], [True, True, True, True], [False] * 4]
    mean, (low, high) = rlep.mean_at_k(correct)
    half = 1.96 * np.std([0.25, 1.0, 0.0], ddof=1) / math.sqrt(3)
    assert mean == pytest.approx(5 / 12) and (low, high) == pytest.approx((5 / 12 - half, 5 / 12 + half))
    assert rlep.mean_at_k([[True, False]]) == (0.5, [0.5, 0.5])
    assert rlep.pass_at_k(correct) == pytest.approx(2 / 3) and rlep.pass_at_k(correct, 1) == pytest.approx(5 / 12)
    assert rlep.pass_at_k(correct, 2) == pytest.approx((0.5 + 1 + 0) / 3)  # 1 - C(3, 2) / C(4, 2) = 0.5
    answers = [["3", "1", "1", None], ["5", "5", "6", "6"], [None, None, None, None], [None, None, None, "2"]]
    marks = [[True, False, False, False], [True, True, False, False], [False] * 4, [False, False, False, True]]
    assert rlep.maj_at_k(answers, marks) == 0.5  # the second (its first answer wins the tie) and the fourth

def test_question_order():
    """Every question once an epoch, shuffled anew; any part of the sequence is the same wherever it is cut."""
    whole = rlep.question_order(7, seed=3, first=0, number=21)
    epochs = [whole[i:i + 7] for i in (0, 7, 14)]
    assert all(sorted(epoch) == list(range(7)) for epoch in epochs) and len(set(map(tuple, epochs))) == 3
    assert [i for first in range(0, 20, 5) for i in rlep.question_order(7, 3, first, 5)] == whole[:20]
    assert rlep.question_order(7, 4, 0, 21) != whole

# ---- The RL step --------------------------------------------------------------------------------------------------

def step_config(**changes):
    return Config(device="cpu", micro_tokens=2048, group_size=16, max_new_tokens=6, minibatch_prompts=1, **changes)

@pytest.fixture
def two_problems():
    """Two problems, and pools with three right and two wrong answers to the first of them only."""
    (problem, other), right, wrong = rlep.embedded_problems(2, 5), ExperiencePool(), ExperiencePool(failed=True)
    for start in ("", "Work: ", "1+1=2,"):
        assert right.add(problem.question, problem.gold, f"{start}\\boxed{{{problem.gold}}}")
    for text in ("\\boxed{11}", "\\boxed{12}"):
        assert wrong.add(problem.question, problem.gold, text)
    return [problem, other], right, wrong

def replayed(policy, problems, pools, config, step=1, **options):
    rollouts = rlep.make_groups(policy, problems, pools, config, step, **options)
    return [(policy.text(r.response), r.reward) for r in rollouts if r.replayed]

def test_replays_join_the_groups_they_belong_to(policy, two_problems):
    """G fresh answers each, and M of its own from the pool for the question that has some; none invented."""
    problems, pool, _ = two_problems
    rollouts = rlep.make_groups(policy, problems, [pool], step_config(replays=2), 1)
    assert Counter((r.group, r.replayed) for r in rollouts) == {(0, False): 16, (0, True): 2, (1, False): 16}
    for rollout in rollouts:
        assert rollout.prompt == policy.prompt(problems[rollout.group])
        if rollout.replayed:
            assert policy.text(rollout.response) in pool.answers[problems[0].question]
            assert rollout.response[-1] == policy.tokenizer.eos_token_id and rollout.correct and rollout.reward == 1
    assert replayed(policy, problems, [], step_config()) == []

def test_draws_follow_from_seed_step_and_question(policy, two_problems):
    """The same for the same three, others for others."""
    problems, pool, _ = two_problems
    for problem in problems:
        pool.answers[problem.question] = [f"1+{i}" for i in range(9)]
    first, again, step, seed = (replayed(policy, problems, [pool], step_config(replays=4, seed=seed), step)
                                for seed, step in ((0, 1), (0, 1), (0, 2), (1, 1)))
    assert first == again and first not in (step, seed) and first[:4] != first[4:]

def test_rescue_and_replay_failed(policy, two_problems):
    """--rescue: only where every fresh answer failed. With the pool of wrong answers: M of them too, with reward -1."""
    problems, right, wrong = two_problems
    for lucky in (False, True):
        drawn = replayed(policy, problems, [right], step_config(rescue=True), score=lambda *_: (lucky, 0.0))
        assert len(drawn) == (0 if lucky else 2)
    drawn = replayed(policy, problems, [right, wrong], step_config())
    assert [reward for _, reward in drawn] == [1, 1, -1, -1]
    assert {text for text, _ in drawn[2:]} == {"\\boxed{11}", "\\boxed{12}"}

def test_one_baseline_for_fresh_and_replayed(policy, two_problems, monkeypatch):
    """The advantages that reach the update: 16 failures -0.34, 2 replays +2.75; mini-batches are whole groups."""
    problems, pool, _ = two_problems
    seen, real, right = [], rlep.update_policy, pool.answers[problems[0].question]

    def spy(model, optimizer, prompts, responses, advantages, old, *rest, **options):
        stats = real(model, optimizer, prompts, responses, advantages, old, *rest, **options)
        seen.append((prompts, advantages.tolist(), old, options["learning_rate"], stats["ratio_max"]))
        return stats

    monkeypatch.setattr(rlep, "update_policy", spy)
    row = rlep.train_step(policy, MasterAdamW(policy.model), problems, [pool],
                          step_config(temperature=0.8, learning_rate=4e-4, lr_warmup_steps=4), 1, {"micro_tokens": 999},
                          lambda policy, _, response, *rest: (False, 1.0 if policy.text(response) in right else -1.0))
    (prompts, advantages, old, rate, ratio), (other, zeros, *_) = seen
    assert prompts == [policy.prompt(problems[0])] * 18 and other == [policy.prompt(problems[1])] * 16
    assert advantages == pytest.approx([-0.3436] * 16 + [2.7487] * 2, abs=1e-4) and zeros == [0.0] * 16
    assert old.shape[0] == 18 and ratio == pytest.approx(1, abs=1e-4)  # old log-probs are those of the same temperature
    assert rate == 1e-4  # the first of 4 warm-up steps
    assert (row["replays"], row["updates"], row["zero_variance"], row["accuracy"], row["reward"]) == (2, 2, 0.5, 0, -1)

def test_reward(policy):
    """1 or -1, less the penalty on an answer near the limit."""
    config, problem = step_config(overlong_buffer=4, overlong_factor=0.5), Problem("1+1=", "2")
    right = rlep.score(policy, problem, policy.tokens("\\boxed{2}"), config)
    assert right == (True, pytest.approx(0.75))  # 4 of 6 tokens
    assert rlep.score(policy, problem, policy.tokens("2"), config) == (False, -1.0)

# ---- The real path, end to end ------------------------------------------------------------------------------------

def test_run_leaves_everything(finished):
    """Every file that the README names, with the keys that other programs read."""
    summary = read_json(finished / "summary.json")
    assert {"base", "arms", "pool", "steps_to_baseline_peak", "seconds", "config"} <= set(summary)
    rows = {arm: read_rows(finished / arm / "metrics.jsonl") for arm in ("vanilla", "rlep")}
    for name, arm in summary["arms"].items():
        assert {"curve", "peak", "final", "final_ci95", "seconds_per_step"} <= set(arm)
        assert [row["step"] for row in rows[name]] == list(range(7)) and [step for step, _ in arm["curve"]] == [0, 3, 6]
        assert arm["curve"] == [[row["step"], row["mean_at_k"]] for row in rows[name] if "mean_at_k" in row]
        assert arm["final"] == arm["curve"][-1][1] and arm["peak"] == max(value for _, value in arm["curve"])
        assert arm["final_ci95"][0] <= arm["final"] <= arm["final_ci95"][1] and arm["seconds_per_step"] > 0
    assert summary["base"] == rows["vanilla"][0]["mean_at_k"] == rows["rlep"][0]["mean_at_k"]
    assert read_json(finished / "config.json")["steps"] == summary["config"]["steps"] == 6
    assert (finished / "curves.png").read_bytes().startswith(b"\x89PNG")
    reached = [step for step, value in summary["arms"]["rlep"]["curve"] if value >= summary["arms"]["vanilla"]["peak"]]
    assert summary["steps_to_baseline_peak"] == (reached[0] if reached else None)
    assert not list(finished.rglob("*.partial*"))

def test_collected_pool(finished, files):
    """Verified answers to training questions only, all different, as counted in the summary."""
    questions = [row["prompt"][-1]["content"] for row in read_rows(files / "train.jsonl")]
    rows = read_rows(finished / "pool.jsonl")
    candidates = {row["prompt"][-1]["content"]: row["reward_model"]["candidates"] for row in rows}
    assert len(candidates) >= 4 and set(candidates) <= set(questions)
    for texts in candidates.values():
        assert len(set(texts)) == len(texts) and all(rlep.verify(text, "7") and "<eos>" not in text for text in texts)
    counted = read_json(finished / "summary.json")["pool"]
    assert counted["questions"] == len(candidates) and counted["answers"] == sum(map(len, candidates.values()))

def test_rl_raises_the_reward(finished, files):
    """Both arms learn, in training and on held-out problems; RLEP alone replays, M or all that there are."""
    summary = read_json(finished / "summary.json")
    held = [len(row["reward_model"]["candidates"]) for row in read_rows(finished / "pool.jsonl")]
    batches = [rlep.question_order(len(held), 0, 4 * step, 4) for step in range(6)]
    for name, replays in ("vanilla", [0] * 6), ("rlep", [sum(min(2, held[i]) for i in batch) for batch in batches]):
        steps = read_rows(finished / name / "metrics.jsonl")[1:]
        assert [row["replays"] for row in steps] == replays
        assert steps[-1]["reward"] > steps[0]["reward"] + 0.4 and steps[-1]["accuracy"] > steps[0]["accuracy"] + 0.2
        assert summary["arms"][name]["final"] > summary["base"] + 0.2
        assert all(row["updates"] == 2 and row["skipped"] == 0 for row in steps)

@pytest.mark.parametrize("arm", ["vanilla", "rlep"])
def test_eval_reproduces_the_summary(finished, files, capsys, arm):
    """The exported folder is the policy that was evaluated."""
    assert main(["eval", *RUN, "--model", str(finished / arm / "policy"), "--data", str(files / "held_out.jsonl")]) == 0
    last = read_rows(finished / arm / "metrics.jsonl")[-1]
    assert capsys.readouterr().out.strip().splitlines()[-1] == rlep.accuracy_line(last)

def test_exported_policy_in_plain_transformers(finished):
    """Any tool loads the folder, and it generates what was trained."""
    folder = finished / "rlep/policy"
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    prompt = tokenizer.apply_chat_template(chat("1*2+3*1+1*2 mod 10 = "), return_tensors="pt", return_dict=True)
    answer = model.generate(**prompt, do_sample=False, max_new_tokens=24)[0, prompt["input_ids"].shape[1]:].tolist()
    ours = roll(Policy(str(folder), "cpu").model, prompt["input_ids"].tolist(), 1, 24, temperature=0)
    assert ours == [[answer]]
    trained = torch.load(finished / "rlep/checkpoint.pt", weights_only=True)["model"]
    assert all(torch.equal(trained[name], value) for name, value in model.state_dict().items())

def test_a_finished_run_says_so(finished, data, capsys):
    """Status 0, the result once more, and not a byte changed."""
    before = snapshot(finished)
    assert main(["run", *RUN, *data, "--out", str(finished)]) == 0
    printed = capsys.readouterr()
    assert "finished" in printed.err and "RLEP" in printed.out and snapshot(finished) == before

def test_another_configuration_is_refused(trained, files, data, capsys):
    """The line names what differs; nothing is changed."""
    before = snapshot(trained)
    words = train_words(files, data, trained, "--steps", "6", "--learning_rate", "0.5", "--group_size", "5")
    status, lines = main(words), capsys.readouterr().err.splitlines()
    assert status == 2 and "--learning_rate" in lines[-1] and "--group_size" in lines[-1]
    assert snapshot(trained) == before and len(lines) == 1

def test_overwrite_starts_anew(trained, files, data, tmp_path):
    """The same folder, another seed: what was there is gone."""
    shutil.copytree(trained, tmp_path / "run")
    (tmp_path / "run/leftover.txt").write_text("x")
    assert main(train_words(files, data, tmp_path / "run", "--overwrite", "--seed", "2", "--steps", "1")) == 0
    assert not (tmp_path / "run/leftover.txt").exists() and len(read_rows(tmp_path / "run/metrics.jsonl")) == 2
    assert read_json(tmp_path / "run/config.json")["seed"] == 2

def test_plot(finished, trained, tmp_path, capsys):
    """One table and one picture of several runs: arms side by side, seeds of an arm averaged."""
    assert main(["plot", str(finished), str(trained), "--out", str(tmp_path)]) == 0
    table = capsys.readouterr().out
    assert "| | vanilla RL | RLEP, M=2 |" in table and "| seeds | 2 | 1 |" in table
    finals = [read_json(path / "summary.json")["final"] for path in (finished / "vanilla", trained)]
    assert f"| mean@k, step 6 | {np.mean(finals):.1%} ±" in table
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")

def test_plot_of_runs_evaluated_at_different_steps(trained, files, data, tmp_path, capsys):
    """Two seeds of an arm with another --eval_every: a picture of what they share, or one line, but no traceback."""
    assert main(train_words(files, data, tmp_path / "run", "--seed", "2", "--steps", "6", "--eval_every", "6")) == 0
    assert main(["plot", str(trained), str(tmp_path / "run"), "--out", str(tmp_path)]) in (0, 2)

def test_collect_alone(finished, data, tmp_path, capsys):
    """The same pool as within a run; started again, it says that it is finished and changes nothing."""
    words = ["collect", *RUN, *data, "--model", str(finished / "vanilla/policy"), "--out", str(tmp_path / "out")]
    assert main(words) == 0 and (tmp_path / "out/pool.jsonl").read_bytes() == (finished / "pool.jsonl").read_bytes()
    before = snapshot(tmp_path / "out")
    capsys.readouterr()
    assert main(words) == 0 and snapshot(tmp_path / "out") == before and "finished" in capsys.readouterr().err

def test_bench(files, tmp_path, capsys):
    """Its last line is JSON with the measures that the comparison with other trainers reads."""
    prompts = write_rows(tmp_path / "prompts.jsonl", [{"prompt": "1+2="}, {"prompt": "3*4+5="}])
    assert main(["bench", "--model", str(files / "tiny"), "--prompts", prompts,
                 *"--group_size 3 --max_new_tokens 5 --steps 1 --threads 1".split()]) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    names = "sample_s resp_tokens old_logp_s train_s step_s peak_sample_mib peak_train_mib"
    assert set(names.split()) <= set(result)
    assert result["sample_s"] + result["train_s"] <= result["step_s"] * 1.01 and 6 <= result["resp_tokens"] <= 30

def test_train_without_chat_template(files, data, tmp_path):
    """Nothing on the way asks for a template."""
    words = train_words(files, data, tmp_path / "out", "--model", str(plain_model(files, tmp_path)), "--steps", "1")
    assert main(words) == 0 and (tmp_path / "out/policy/model.safetensors").exists()

def test_supervised_steps_instead_of_replay(finished, data, tmp_path):
    """--sft_steps: trains on the pool first (accuracy rises before RL), then RL without replay."""
    assert main(["train", *RUN, *data, "--model", str(finished / "base/policy"), "--pool", str(finished / "pool.jsonl"),
                 *"--sft_steps 40 --steps 1 --out".split(), str(tmp_path / "out")]) == 0
    rows = read_rows(tmp_path / "out/metrics.jsonl")
    assert rows[0]["mean_at_k"] > read_rows(finished / "rlep/metrics.jsonl")[0]["mean_at_k"] + 0.2
    assert rows[1]["replays"] == 0 and [row["step"] for row in rows] == [0, 1]

# ---- Bad input ----------------------------------------------------------------------------------------------------

@pytest.fixture(scope="session")
def bad_files(files, finished, tmp_path_factory):
    """Files that are wrong in one way each; tmp/FILE in the table below."""
    folder, good = tmp_path_factory.mktemp("bad"), json.dumps({"question": "1+1?", "answer": "2"})
    texts = {"empty.jsonl": "", "blank.jsonl": "\n\n", "list.jsonl": "[1, 2]\n",
             "pairs.jsonl": '[["question", "1+1?"], ["answer", "2"]]\n', "one.jsonl": good + "\n",
             "torn_1.jsonl": f'{{"question": "1+\n{good}\n', "torn_3.jsonl": f'{good}\n\n{{"question": "1+\n',
             "no_question.jsonl": f'{good}\n{{"answer": "2"}}\n',
             "no_answer.jsonl": f'{good}\n{{"question": "1+1?", "answer": " "}}\n'}
    for name, text in texts.items():
        (folder / name).write_text(text)
    (folder / "latin.jsonl").write_bytes(b'{"question": "\xe9", "answer": 1}\n')
    write_rows(folder / "others.jsonl", [authors_row("elsewhere?", "2", "\\boxed{2}", "so \\boxed{2}")])
    write_rows(folder / "no_texts.jsonl", [authors_row("a?", "2", "\\boxed{2}"), {"question": "a?", "answer": "2"}])
    pool = (finished / "pool.jsonl").read_text().splitlines(keepends=True)
    (folder / "torn_pool.jsonl").write_text(pool[0] + pool[1][:50] + "\n" + "".join(pool[2:]))
    (folder / "folder").mkdir()
    (folder / "folder/notes.txt").write_text("mine")
    shutil.copytree(files / "tiny", folder / "endless")
    settings = read_json(folder / "endless/tokenizer_config.json")
    del settings["eos_token"]
    (folder / "endless/tokenizer_config.json").write_text(json.dumps(settings))
    return folder

@pytest.mark.parametrize("words, named", [
    ("--no_such_flag 3", "--no_such_flag"), ("dance", "dance"), ("train now", "now"), ("--steps many", "many"),
    ("--device tpu", "tpu"), ("--device cuda", "--device cuda"), ("--steps 0", "--steps"),
    ("--group_size 1", "--group_size"), ("--learning_rate nan", "--learning_rate"),
    ("--learning_rate -1", "--learning_rate"), ("--top_p 0", "--top_p"), ("--collect_top_p 1.5", "--collect_top_p"),
    ("--replays -1", "--replays"), ("--k 0", "--k"), ("train --sft_steps 5", "--sft_steps"),
    ("--data tmp/folder", "folder"), ("train --data tmp/absent.jsonl", "absent.jsonl"),
    ("--data tmp/empty.jsonl", "empty.jsonl"), ("train --data tmp/blank.jsonl", "blank.jsonl"),
    ("collect --data tmp/torn_1.jsonl", "torn_1.jsonl:1"), ("train --data tmp/torn_3.jsonl", "torn_3.jsonl:3"),
    ("train --data tmp/list.jsonl", "list.jsonl:1"),
    ("train --data tmp/pairs.jsonl", "pairs.jsonl:1"), ("train --data tmp/latin.jsonl", "latin.jsonl:1"),
    ("train --data tmp/no_question.jsonl", "no_question.jsonl:2"),
    ("train --data tmp/no_answer.jsonl", "no_answer.jsonl:2"),
    ("train --eval_size 2 --data tmp/one.jsonl", "--eval_size"),
    ("eval --data tmp/absent.jsonl --model TINY", "absent.jsonl"), ("eval --model tmp/absent", "--model"),
    ("plot", "RUN"), ("plot tmp/folder", "folder"), ("bench", "--prompts"),
    ("bench --model TINY --prompts tmp/absent.jsonl", "absent.jsonl"), ("train --out tmp/folder DATA", "folder"),
    ("train --out tmp/one.jsonl DATA", "one.jsonl"),
    ("train --model tmp/absent", "absent"), ("train --model tmp/folder", "folder"),
    ("train --model tmp/endless", "end token"), ("train --pool tmp/absent.jsonl DATA", "absent.jsonl"),
    ("train --prompts_per_step 20 --minibatch_prompts 4 DATA", "--prompts_per_step 20"),
    ("train --pool tmp/empty.jsonl DATA", "empty.jsonl"), ("train --pool tmp/others.jsonl DATA", "others.jsonl"),
    ("train --pool tmp/torn_pool.jsonl DATA", "torn_pool.jsonl:2"),
    ("train --pool tmp/no_texts.jsonl DATA", "no_texts.jsonl:2"),
    ("train --pool POOL --replays 999 DATA", "--replays 999")])
def test_bad_input(words, named, bad_files, files, finished, data, tmp_path, capsys, monkeypatch):
    """Status 2, one line that names the thing, and no trace: the mended command must not meet a half-made folder."""
    if "cuda" in words and torch.cuda.is_available():
        pytest.skip("this machine has what the test wants to be missing")
    monkeypatch.chdir(tmp_path)
    words = words.replace("tmp/", f"{bad_files}/").replace("DATA", " ".join(data)).split()
    words = [{"TINY": f"{files}/tiny", "POOL": f"{finished}/pool.jsonl"}.get(word, word) for word in words]
    words += ["--model", str(files / "tiny")] if "train" in words and "--model" not in words else []
    words += ["--max_new_tokens", "24"] + (["--prompts_per_step", "2"] if "--prompts_per_step" not in words else [])
    before = snapshot(bad_files)
    status, lines = main(words), capsys.readouterr().err.splitlines()
    lines = [line for line in lines if ": left out " not in line]  # the count of what a pool lost is no complaint
    assert status == 2 and len(lines) == 1 and lines[0].startswith("rlep.py: error:") and named in lines[0]
    assert snapshot(bad_files) == before and snapshot(tmp_path) == {}

def test_bad_input_does_not_delete_a_run(trained, files, data, bad_files, tmp_path, capsys):
    """--overwrite deletes only when everything else about the command is right."""
    shutil.copytree(trained, tmp_path / "run")
    before = snapshot(tmp_path / "run")
    for more in (["--prompts_per_step", "99"], ["--model", "/absent"], ["--pool", str(bad_files / "others.jsonl")]):
        assert main(train_words(files, data, tmp_path / "run", "--overwrite", *more)) == 2
        assert snapshot(tmp_path / "run") == before

def test_parquet_without_pyarrow(tmp_path, capsys, monkeypatch):
    """A clear line, since pyarrow is no requirement."""
    monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
    (tmp_path / "data.parquet").write_bytes(b"PAR1")
    assert main(["train", "--data", str(tmp_path / "data.parquet")]) == 2 and "pyarrow" in capsys.readouterr().err

# ---- Nothing is lost ----------------------------------------------------------------------------------------------

def child(words, log, file_limit):
    """In a process of its own: rlep.main with its output in a file and, if asked for, a bound on the size of files."""
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell may have started the tests with Ctrl-C ignored
    os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 2)
    if file_limit:
        import resource
        resource.setrlimit(resource.RLIMIT_FSIZE, (file_limit, file_limit))
    raise SystemExit(main(words))

@pytest.fixture(scope="session")
def start():
    """Starts rlep.main(words) in a process of its own, forked off one that has loaded everything: quick."""
    context = multiprocessing.get_context("forkserver")
    os.environ["PYTHONPATH"] = str(Path(__file__).parent)
    context.set_forkserver_preload([Path(__file__).stem])

    def start(words, log, file_limit=0):
        process = context.Process(target=child, args=(list(map(str, words)), str(log), file_limit))
        process.start()
        return process

    return start

def signature(path):
    """Changes when a file, or the unfinished one beside it, is written."""
    found = []
    for file in (path, path.with_name(path.name + ".partial")):
        try:
            stat = file.stat()
            found.append((stat.st_mtime_ns, stat.st_size, stat.st_ino))
        except FileNotFoundError:
            found.append(None)
    return found

MOMENTS = [  # once this, or anything further down, is being written, the run is killed within so many seconds
    ("base/config.json", 1.5), ("base/checkpoint.pt", 0.003), ("base/policy", 0.005), ("vanilla/config.json", 0.2),
    ("vanilla/metrics.jsonl", 0.1), ("vanilla/checkpoint.pt", 0.003), ("vanilla/checkpoint.pt", 0.2),
    ("vanilla/policy", 0.005), ("collection.partial.jsonl", 0.1), ("collection.partial.jsonl", 0.1),
    ("pool.jsonl", 0.003), ("rlep/metrics.jsonl", 0.1), ("rlep/checkpoint.pt", 0.003), ("rlep/checkpoint.pt", 0.2),
    ("rlep/policy", 0.002), ("summary.json", 0.0)]

def test_killed_at_any_moment(finished, data, start, tmp_path):
    """kill -9 in every phase, also in the middle of saves: the result is that of an undisturbed run, byte for byte."""
    rng, kills, phases, out = random.Random(0), 0, set(), tmp_path / "run"
    for i, (_, longest) in enumerate(MOMENTS):
        paths = [out / name for name, _ in MOMENTS[i:]]
        before = list(map(signature, paths))
        process = start(["run", *RUN, *data, "--out", out], tmp_path / "log")
        while process.is_alive() and list(map(signature, paths)) == before:
            time.sleep(0.0005)
        time.sleep(rng.uniform(0, longest))
        process.kill()
        process.join()
        assert process.exitcode in (-signal.SIGKILL, 0), (tmp_path / "log").read_text()
        kills += process.exitcode == -signal.SIGKILL
        ends = ("base/summary.json", "vanilla/summary.json", "collection.json")
        phases.add(tuple((out / end).exists() for end in ends))
    assert kills >= 10 and len(phases) == 4
    assert main(["run", *RUN, *data, "--out", str(out)]) == 0
    assert result_of(out) == result_of(finished)

class Crash(BaseException):
    """What no handler catches."""

def test_files_are_whole_or_as_they_were(tmp_path, monkeypatch):
    """A new content is complete and on the disk before it takes the old one's name."""
    path, done = tmp_path / "file", []
    rlep.write_whole(path, "old")

    def half(file):
        file.write(b"ha")
        file.flush()
        raise Crash

    with pytest.raises(Crash):
        rlep.write_whole(path, half)
    assert path.read_text() == "old"
    fsync, rename = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda file: done.append(("on disk", path.read_text())) or fsync(file))
    monkeypatch.setattr(os, "replace", lambda *names: done.append(("renamed", path.read_text())) or rename(*names))
    rlep.write_whole(path, "new")
    assert done == [("on disk", "old"), ("renamed", "old")] and path.read_text() == "new"

@pytest.mark.parametrize("answered", [1, 4, 7])
def test_collection_goes_on(answered, finished, data, tmp_path, monkeypatch):
    """Stopped after some questions, within a batch of two or at its end, and in the middle of a line: the same pool."""
    words = ["collect", *RUN, *data, "--model", str(finished / "vanilla/policy"), "--out", str(tmp_path / "out")]
    real, calls = rlep.append_row, []

    def stops(*row):
        real(*row)
        calls.append(1)
        if len(calls) == answered:
            raise Crash

    with monkeypatch.context() as patch, pytest.raises(Crash):
        patch.setattr(rlep, "append_row", stops)
        main(words)
    gc.collect()
    with open(tmp_path / "out/collection.partial.jsonl", "a") as file:
        file.write('{"texts": ["\\\\bo')
    assert main(words) == 0 and (tmp_path / "out/pool.jsonl").read_bytes() == (finished / "pool.jsonl").read_bytes()
    first, whole = read_json(tmp_path / "out/collection.json"), read_json(finished / "collection.json")
    assert all(first[name] == whole[name] for name in ("questions", "answers", "tokens"))

@pytest.fixture(scope="session")
def interrupted(files, data):
    """A train of 6 steps that was stopped in the 6th, when the last checkpoint was that of the 4th."""
    real = rlep.train_step

    def stops(policy, optimizer, batch, pool, config, step, *rest):
        if step == 6:
            raise Crash
        return real(policy, optimizer, batch, pool, config, step, *rest)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Crash):
        patch.setattr(rlep, "train_step", stops)
        main(train_words(files, data, files / "interrupted", "--steps", "6", "--save_every", "2"))
    assert len(read_rows(files / "interrupted/metrics.jsonl")) == 6  # steps 0 to 5
    return files / "interrupted"

def leave_torn_line(folder):
    with open(folder / "metrics.jsonl", "a") as file:
        file.write('{"step": 6, "accu')

def leave_unfinished_files(folder):
    for name in ("checkpoint.pt.partial", "config.json.partial", "summary.json.partial"):
        (folder / name).write_bytes(b"half of")
    for name in ("policy.partial", "policy"):
        (folder / name).mkdir()
        (folder / name / "stale.bin").write_bytes(b"half of")

@pytest.mark.parametrize("damage", [
    lambda folder: None, leave_torn_line, leave_unfinished_files, lambda folder: truncate(folder / "metrics.jsonl"),
    lambda folder: (folder / "metrics.jsonl").unlink()])
def test_leftovers_of_a_crash_do_no_harm(damage, interrupted, trained, files, data, tmp_path):
    """Rows after the checkpoint are made again, not kept twice; half-written files are ignored; lost metrics come back."""
    shutil.copytree(interrupted, tmp_path / "run")
    damage(tmp_path / "run")
    assert main(train_words(files, data, tmp_path / "run", "--steps", "6", "--save_every", "2")) == 0
    assert result_of(tmp_path / "run") == result_of(trained) and not list((tmp_path / "run").rglob("*.partial"))

def truncate(path):
    path.write_bytes(path.read_bytes()[:path.stat().st_size // 2])

def foreign(path):
    state = torch.load(path, weights_only=True)
    state["model"] = {name: value[..., :-1].clone() for name, value in state["model"].items()}
    torch.save(state, path)

@pytest.mark.parametrize("name, damage", [
    ("checkpoint.pt", truncate), ("checkpoint.pt", foreign), ("checkpoint.pt", lambda path: path.write_bytes(b"")),
    ("checkpoint.pt", lambda path: torch.save({"step": 3}, path)), ("config.json", truncate)])
def test_damaged_files(name, damage, interrupted, files, data, tmp_path, capsys):
    """One line that names the file; everything is left as it was."""
    shutil.copytree(interrupted, tmp_path / "run")
    damage(tmp_path / "run" / name)
    before = snapshot(tmp_path / "run")
    assert main(train_words(files, data, tmp_path / "run", "--steps", "6", "--save_every", "2")) == 2
    lines, after = capsys.readouterr().err.splitlines(), snapshot(tmp_path / "run")
    assert len(lines) == 1 and lines[0].startswith("rlep.py: error:") and name in lines[0]
    config = str(tmp_path / "run/config.json")  # of a moved folder, it may note the new --out
    assert all(after[path] == content for path, content in before.items() if path != config or name == "config.json")

def test_killed_while_overwriting(trained, files, data, tmp_path, monkeypatch):
    """Whatever --overwrite has deleted by then, the same command does the rest and starts anew."""
    shutil.copytree(trained, tmp_path / "run")
    words, real, unlink = train_words(files, data, tmp_path / "run", "--overwrite"), Path.iterdir, Path.unlink

    def stops(path):
        unlink(path)
        if path.name != "checkpoint.pt":
            raise Crash

    with monkeypatch.context() as patch, pytest.raises(Crash):
        patch.setattr(Path, "iterdir", lambda path: iter(sorted(real(path))))  # config.json before metrics.jsonl
        patch.setattr(Path, "unlink", stops)
        main([*words, "--steps", "3"])
    assert main([*words, "--steps", "3"]) == 0

def test_corrupted_pool_in_a_run(finished, data, tmp_path, capsys):
    """The replay phase names the line instead of training on what is left."""
    shutil.copytree(finished, tmp_path / "backup")
    try:
        shutil.rmtree(finished / "rlep")
        (finished / "summary.json").unlink()
        truncate(finished / "pool.jsonl")
        line = len((finished / "pool.jsonl").read_text().splitlines())
        assert main(["run", *RUN, *data, "--out", str(finished)]) == 2
        assert f"pool.jsonl:{line}" in capsys.readouterr().err.splitlines()[-1]
    finally:
        shutil.rmtree(finished)
        shutil.move(tmp_path / "backup", finished)

def test_longer_training_goes_on(trained, files, data, tmp_path, capsys):
    """train with more --steps continues a finished run, and equals one that was that long from the start."""
    assert main(train_words(files, data, tmp_path / "run", "--steps", "3")) == 0
    assert main(train_words(files, data, tmp_path / "run", "--steps", "6")) == 0
    assert result_of(tmp_path / "run") == result_of(trained) and "finished" not in capsys.readouterr().err
    curves = [read_json(folder / "summary.json")["curve"] for folder in (tmp_path / "run", trained)]
    assert curves[0] == curves[1]

def test_supervised_steps_go_on(tmp_path, monkeypatch):
    """A warm-up of 104 steps, stopped after its checkpoint at the fifth, does the other 99 only, with the same result."""
    real, config, calls = rlep.warm_up_examples, Config(device="cpu", micro_tokens=2048, warmup_steps=104), []

    def examples(*given, stop=10**9):
        calls.append(1)
        if len(calls) > stop:
            raise Crash
        return real(*given, number=2)

    monkeypatch.setattr(rlep, "warm_up_examples", examples)
    rlep.make_base(config, tmp_path / "whole")
    calls.clear()
    monkeypatch.setattr(rlep, "warm_up_examples", lambda *given: examples(*given, stop=102))
    with pytest.raises(Crash):
        rlep.make_base(config, tmp_path / "stopped")
    calls.clear()
    rlep.make_base(config, tmp_path / "stopped")
    assert len(calls) == 99 and result_of(tmp_path / "stopped") == result_of(tmp_path / "whole")

def test_second_run_and_ctrl_c(files, data, start, tmp_path, capsys):
    """A folder in use is refused; Ctrl-C ends with one line saying how to go on, status 130."""
    words = train_words(files, data, tmp_path / "run", "--steps", "400")
    process = start(words, tmp_path / "log")
    while process.is_alive() and not (tmp_path / "run/checkpoint.pt").exists():
        time.sleep(0.01)
    assert main(words) == 2 and "another run" in capsys.readouterr().err
    os.kill(process.pid, signal.SIGINT)
    process.join(60)
    log = (tmp_path / "log").read_text()
    assert process.exitcode == 130 and "same command goes on" in log.splitlines()[-1] and "Traceback" not in log

@pytest.mark.parametrize("what, limit", [("checkpoint.pt", 1_000_000), ("policy", 100_000)])
def test_full_disk(what, limit, trained, files, data, start, tmp_path):
    """A write that fails: status 2, one line, the last checkpoint as it was; with room again, the run goes on."""
    words = train_words(files, data, tmp_path / "run", "--steps", "6")
    if what == "checkpoint.pt":
        assert main(train_words(files, data, tmp_path / "run", "--steps", "3")) == 0
    else:  # all steps done, the policy not yet written
        shutil.copytree(trained, tmp_path / "run", ignore=lambda *_: ["policy", "summary.json"])
    before = (tmp_path / "run/checkpoint.pt").read_bytes()
    process = start(words, tmp_path / "log", limit)
    process.join(60)
    log = (tmp_path / "log").read_text()
    assert process.exitcode == 2 and log.splitlines()[-1].startswith("rlep.py: error:") and "Traceback" not in log
    assert (tmp_path / "run/checkpoint.pt").read_bytes() == before
    assert main(words) == 0 and result_of(tmp_path / "run") == result_of(trained)

def test_exporting_keeps_the_old_policy_until_the_new_one_is_whole(policy, tmp_path, monkeypatch):
    """A full disk during the export must not cost the policy that was there."""
    policy.save(tmp_path / "policy")
    before = snapshot(tmp_path / "policy")

    def full(*args, **options):
        raise OSError("No space left on device")

    monkeypatch.setattr(policy.model, "save_pretrained", full)
    with pytest.raises((OSError, rlep.UserError)):
        policy.save(tmp_path / "policy")
    assert snapshot(tmp_path / "policy") == before

def spoil_loss(patch, spoilt):
    """Makes the loss of those updates (counted from 1) not a number."""
    real, calls = rlep.policy_loss, []

    def loss(*args, **options):
        calls.append(1)
        value, stats = real(*args, **options)
        return (value * math.nan if spoilt(len(calls)) else value), stats

    patch.setattr(rlep, "policy_loss", loss)

def test_non_finite_loss_is_skipped_and_counted(trained, files, data, tmp_path, monkeypatch):
    """One bad update costs that update, no more, and shows in the metrics."""
    spoil_loss(monkeypatch, lambda call: call == 1)
    assert main(train_words(files, data, tmp_path / "run", "--steps", "3")) == 0
    skipped = [row["skipped"] for row in read_rows(tmp_path / "run/metrics.jsonl")[1:]]
    assert sum(skipped) == 1
    weights = torch.load(tmp_path / "run/checkpoint.pt", weights_only=True)["model"]
    assert all(value.isfinite().all() for value in weights.values())

def test_ten_non_finite_updates_stop_training(files, data, tmp_path, monkeypatch, capsys):
    """It stops with status 2 and says what to lower; the weights are still those it started from."""
    spoil_loss(monkeypatch, lambda call: True)
    real = rlep.group_advantages  # every group teaches something, so that every update is spoilt
    monkeypatch.setattr(rlep, "group_advantages", lambda rewards, ids: real(torch.arange(len(rewards)).float(), ids))
    assert main(train_words(files, data, tmp_path / "run", "--steps", "30")) == 2
    assert "--learning_rate" in capsys.readouterr().err.splitlines()[-1]
    assert [row["skipped"] for row in read_rows(tmp_path / "run/metrics.jsonl")[1:]] == [2] * 5
    weights = torch.load(tmp_path / "run/checkpoint.pt", weights_only=True)["model"]
    start = Policy(str(files / "tiny"), "cpu").model.state_dict()
    assert all(torch.equal(weights[name], value) for name, value in start.items())

def test_divergence_is_reported(files, data, tmp_path, capsys):
    """An absurd learning rate, without any help: no traceback, a line that names it."""
    assert main(train_words(files, data, tmp_path / "run", "--steps", "30", "--learning_rate", "1e30")) == 2
    assert "--learning_rate" in capsys.readouterr().err.splitlines()[-1]

# ---- Verifier -----------------------------------------------------------------------------------------------------

# (answer inside the box, gold, equal?); each pair is also tried with the two sides swapped.
SAME = [tuple(line.split(" ~ ")) for line in r"""
17 ~ 17
017 ~ 17
+17 ~ 17
-0 ~ 0
.25 ~ 0.25
- 9 ~ -9
8.0 ~ 8
4,321 ~ 4321
4{,}321 ~ 4321
4\,321 ~ 4321
7,654,321.5 ~ 7654321.50
30,\!000 ~ 30000
\frac{3}{8} ~ 0.375
\dfrac38 ~ 3/8
\tfrac{6}{16} ~ \frac{3}{8}
(5/6) ~ \frac56
-\frac{5}{6} ~ \frac{-5}{6}
4\frac{1}{2} ~ 4.5
-4\frac12 ~ -\frac92
4 1/2 ~ \frac{9}{2}
4½ ~ 9/2
\frac{\sqrt{7}}2 ~ \frac{\sqrt7}{2}
\sqrt{45} ~ 3\sqrt{5}
\frac{1}{\sqrt{5}} ~ \frac{\sqrt{5}}{5}
5^{1/2} ~ \sqrt5
√5 ~ \sqrt{5}
\sqrt[3]{24} ~ 2\sqrt[3]{3}
\sqrt{3}+\sqrt{5} ~ \sqrt5+\sqrt3
(3+\sqrt{2})(3-\sqrt{2}) ~ 7
2\pi/3 ~ \frac{2\pi}{3}
6 π ~ 6\pi
4-2\pi ~ -2\pi+4
3^5 ~ 243
3^{-3} ~ \frac{1}{27}
6! ~ 720
\binom{7}{3} ~ 35
9^{20} ~ 3^{40}
2.5\times10^4 ~ 25000
2.5e-2 ~ 0.025
5×10³ ~ 5000
७३ ~ 73
７/２ ~ 3.5
2-7i ~ -7i+2
\frac{2-7i}{5} ~ \frac25-\frac75i
(2+i)^2 ~ 3+4i
x^2-9 ~ (x-3)(x+3)
2(a+b) ~ 2a+2b
\frac{p}{3q} ~ \frac{p}{3 q}
x \cdot y ~ yx
t^{-1} ~ \frac1t
a_{1}b ~ ba_1
|x-4| ~ |4-x|
\alpha + \beta ~ \beta+\alpha
25\% ~ 25
25\% ~ 0.25
25 \text{ percent} ~ 25\%
31\text{ cm} ~ 31
31\text{ cm}^2 ~ 31
2\pi+1\text{ m} ~ 1+2\pi
9 pencils ~ 9
6.5\ \text{km/h} ~ 6.5
45^\circ ~ 45
45^{\circ} ~ 45°
45\text{ degrees} ~ 45^\circ
\$12 ~ 12
\$12.50 ~ 12.5
€12 ~ 12
12\text{ dollars} ~ \$12
n=9 ~ 9
9=n ~ n = 9
P(B)=\frac27 ~ \frac{2}{7}
f(3)=8 ~ 8
\angle PQR = 40^\circ ~ 40
a+b=12 ~ 12
6\cdot 8=48 ~ 48
y=3-x ~ y=-x+3
x^2+y^2=9 ~ 9 = y^2+x^2
n=2, m=3 ~ m=3, n=2
x=1 \text{ or } x=6 ~ 6, 1
4, 5, \text{ and } 6 ~ 6,5,4
1;3 ~ 3,1
\pm 4 ~ 4,-4
x=\pm 4 ~ -4, 4
2\pm\sqrt{3} ~ 2-\sqrt3, 2+\sqrt3
\frac{1\pm\sqrt{7}}{2} ~ \frac{1-\sqrt7}{2}, \frac{1+\sqrt7}{2}
\{3,8\} ~ \{8,3\}
\{3,8\} ~ 8, 3
\{6\} ~ 6
\{\pm 5, 0\} ~ \{-5,0,5\}
\{\} ~ \emptyset
\left( 2, \frac{1}{4} \right) ~ (2,0.25)
(a,b)=(4,9) ~ (4,9)
(1,5),(2,6) ~ (2,6), (1,5)
\bigl[0,4\bigr) ~ [0, 4)
x\ge 7 ~ [7,\infty)
7 \leq x ~ x \geq 7
-3<t\le 3 ~ (-3,3]
x\in(0,9] ~ (0,9]
x<0 \text{ or } x>5 ~ (-\infty,0)\cup(5,\infty)
(4,5)\cup(0,1) ~ (0,1) \cup (4,5)
\begin{pmatrix}1&0\\0&0.5\end{pmatrix} ~ \begin{bmatrix}1 & 0 \\ 0 & \frac12\end{bmatrix}
\left[\begin{array}{cc}3&4\end{array}\right] ~ \begin{pmatrix}3&4\end{pmatrix}
5 : 8 ~ 5:8
132_5 ~ 132_{5}
-\infty ~ -\infty
\text{Friday} ~ friday
\text{no real roots} ~ No real roots
\mathrm{prime} ~ \text{prime}
\textbf{(B)} ~ B
\text{(B) } 19 ~ B
(B)\ 19 ~ 19
(b) ~ (b)
\lfloor x\rfloor ~ \left\lfloor x \right\rfloor
""".strip().split("\n")]

DIFFERENT = [tuple(line.split(" ~ ")) for line in r"""
17 ~ 71
17 ~ 1.7
17 ~ -17
17 ~ 17x
98765432109876543210 ~ 98765432109876543211
0.3333333333 ~ \frac13
1.7320508075688772 ~ \sqrt3
3.1416 ~ \pi
\frac{22}{7} ~ \pi
0.99999999 ~ 1
43,21 ~ 4321
(4,321) ~ 4321
4.321 ~ 4321
4,321 ~ 321
2³ ~ 23
4½ ~ \frac{41}{2}
4\frac12 ~ 2
4\cdot\frac12 ~ 4\frac12
1 2 ~ 12
{1}{2} ~ 12
5- ~ -5
\frac{5}{0} ~ 5
\sqrt{2}+\sqrt{7} ~ 3
\sqrt{45} ~ 3
1+\frac{\sqrt3}{2} ~ \frac{1+\sqrt3}{2}
3^5 ~ 35
2^{1000} ~ 2^{1001}
10^{999} ~ \infty
6! ~ 6
7i ~ -7i
(x+1)^2 ~ x^2+1
|x| ~ x
x2 ~ x^2
2\lfloor x\rfloor ~ \lfloor 2x\rfloor
N ~ n
50 ~ 0.5
25\% ~ 2.5
25\% ~ 25\text{ cm}
31\text{ cm} ~ 31\text{ km}
31\text{ cm}^2 ~ 31\text{ cm}
\$12 ~ 12\text{ cents}
3\text{ million} ~ 3
3\text{ dozen} ~ 3
4 hours 20 minutes ~ 4
4 hours 20 minutes ~ 20
n=9 ~ -9
-n=9 ~ 9
9n=9 ~ 9
x^2=9 ~ 9
n=9 ~ m=9
14=15 ~ 15
14=15 ~ 14
14\approx15 ~ 14
n=2, m=3 ~ n=3, m=2
n=2, m=3 ~ 3, 2
y=3-x ~ y=3+x
1,2,3 ~ 3
1,1 ~ 1,-1
1,1,2 ~ 1,2,2
\pm 4 ~ 4
3 \text{ or } 4 ~ 4
\{3,8\} ~ (3,8)
\{3,8\} ~ [3,8]
3,8 ~ (3,8)
(3,8) ~ (8,3)
(3,8) ~ [3,8]
(3,8) ~ (3,8,8)
(3.8) ~ (3,8)
\{0\} ~ \emptyset
[0,4) ~ [0,4]
x\ge 7 ~ (7,\infty)
x>7 ~ x<7
x>7 ~ 7
(0,1)\cup(2,3) ~ (0,1)\cup(2,4)
\begin{pmatrix}1&2\\3&4\end{pmatrix} ~ \begin{pmatrix}1&3\\2&4\end{pmatrix}
\begin{pmatrix}1&2\end{pmatrix} ~ \begin{pmatrix}1\\2\end{pmatrix}
6\\7 ~ 6
5:8 ~ 58
132_5 ~ 132_6
\infty ~ -\infty
\text{Friday} ~ \text{Monday}
\text{not } 12 ~ 12
12 \text{ (or 13)} ~ 12
\text{twelve} ~ 12
B ~ D
(B) 19 ~ (D) 19
(B) 19 ~ 91
(B) and (D) ~ B
BD ~ B
B/D ~ B
""".strip().split("\n")]

@pytest.mark.parametrize("left, right, equal", [(*p, True) for p in SAME] + [(*p, False) for p in DIFFERENT])
def test_pairs_in_both_directions(left, right, equal):
    assert verify(rf"Hence the value is $\boxed{{{left}}}$, as claimed.", right) is equal
    assert verify(rf"Hence the value is $\boxed{{{right}}}$, as claimed.", left) is equal

@pytest.mark.parametrize("response, gold, expected", [
    (r"\boxed{3} is too small, so \boxed{4}", "4", True), (r"\boxed{3} is too small, so \boxed{4}", "3", False),
    (r"Roots: $\boxed{3}$ and $\boxed{4}$.", "4,3", True), (r"Roots: $\boxed{3}$ and $\boxed{4}$.", "4", False),
    (r"$\boxed{3}$, $\boxed{4}$, or $\boxed{5}$", "5", False), (r"\boxed{3} \boxed{4}", "4", True),
    (r"\boxed{4} and then \boxed{", "4", False), (r"Answer: 4 \boxed{}", "4", False), (r"4: \boxed{?}", "4", False),
    (r"\boxed{\frac{1}{2}", r"\frac{1}{2}", False), (r"\fbox{6}", "6", True), (r"\boxed 8.", "8", True),
    (r"<think>\boxed{5}</think> Answer: 6", "6", True), (r"<think>\boxed{5}</think> Answer: 6", "5", False),
    ("2+2=4\n#### 4", "4", True), ("#### 1,250", "1250", True), ("so 4\nA: 4", "4", True), ("A: 4.00", "4", True),
    ("Answer: 4 because 2+2=4", "4", True), ("The answer is 3. Wait, the answer is 4.", "3", False),
    ("**Final answer:** $4$", "4", True), ("### Answer\n\n$4$", "4", True), ("<answer>4</answer>", "4", True),
    ("The answer is not 4", "4", False), ("Answer: 3 or 4", "4", False), ("Answer: $3$ or $4$", "3", False),
    ("so 3 * 9 = 27 pens.", "27", True), ("so 3 * 9 = 27 pens.", "3", False), ("x=3 or x=4.", "4", False),
    ("3*7=1,4*8=2,1+2=3\\boxed{3}", "3", True), ("3*7=1,4*8=2,1+2=3\\boxed{13}", "3", False),
    ("\\boxed{42}", "#### 42", True), ("\\boxed{42}", "$42$", True), ("just some 42 words", "42", False),
    ("", "4", False), ("4", "", False), (r"\boxed{}", "", False), (r"\boxed{4}", "  ", False)])
def test_extraction(response, gold, expected):
    assert verify(response, gold) is expected

def test_extract_answer_returns_the_text():
    assert extract_answer(r"so \boxed{\frac{1}{2}}.") == r"\frac{1}{2}"
    assert extract_answer("no result") is None and extract_answer(None) is None

def spellings(rng, kind):
    """Notations of one random value of a kind, and notations of a value that differs."""
    n, d, k = rng.randint(2, 99), rng.choice([2, 4, 5, 8]), rng.choice([2, 3, 5, 6, 7])

    def write(n):
        decimal = str(n / d)
        if kind == "rational":
            return [f"{n}/{d}", rf"\frac{{{n}}}{{{d}}}", rf"\dfrac{{{3 * n}}}{{{3 * d}}}", decimal, f"{decimal}0",
                    rf"x = \tfrac{{{n}}}{{{d}}}", rf"{decimal}\text{{ cm}}", rf"\left({n}/{d}\right)", f"{100 * n}/{d}\\%"]
        if kind == "tuple":
            return [f"({n},{d})", rf"\left( {n} , {d} \right)", rf"({n}.0,\frac{{{2 * d}}}{{2}})", f"(x,y)=({n}, {d})"]
        if kind == "set":
            return [rf"\{{{n},-{d}\}}", f"-{d}, {n}", rf"\left\{{-{d},\;{n}\right\}}", rf"{n} \text{{ and }} -{d}"]
        if kind == "interval":
            return [f"({d - 9},{n}]", rf"{d - 9} < x \leq {n}", rf"\left({d - 9}, {n}.0\right]", rf"x\in({d - 9},{n}]"]
        return [rf"{n}\sqrt{{{k}}}", rf"\sqrt{{{n * n * k}}}", rf"{n}\cdot{k}^{{1/2}}", rf"\frac{{{n * k}}}{{\sqrt{k}}}"]
    return write(n), write(n + rng.choice([1, 10, 100]))

@pytest.mark.parametrize("kind", ["rational", "tuple", "set", "interval", "surd"])
def test_random_round_trips(kind):
    rng = random.Random(20250707)
    for _ in range(40):
        same, other = spellings(rng, kind)
        for left in same:
            assert all(verify(rf"\boxed{{{left}}}", right) for right in same if "%" not in left + right), (left, same)
            assert not any(verify(rf"\boxed{{{left}}}", right) for right in other), (left, other)

HOSTILE = ["(" * 5000, r"\frac{1}{" * 700, "9^" * 700 + "9", "9" * 4400, "1e999999", "10^{10^{10}}", r"\sqrt[0]{5}", "0^{-1}",
           "100000000!", r"\binom{10^9}{5}", "__import__('os')", "().__class__", "\ud800", "\x00", "nan", "inf", r"\pm" * 400,
           "1," * 700, "-" * 1400, "{" * 700 + "6" + "}" * 700, "|" * 900, r"\text{" * 200, "⟦" * 300, "±(" * 300]

def test_hostile_input_is_false_and_never_raises():
    for text in HOSTILE:
        for response in (text, rf"\boxed{{{text}}}", "Answer: " + text, text * 200):
            start = time.perf_counter()
            assert verify(response, "5") is False and verify(r"\boxed{5}", text) is False, text[:50]
            assert time.perf_counter() - start < 2
    for bad in (None, 5, 5.0, b"5", ["5"], {"a": 1}, object()):
        assert verify(bad, "5") is False and verify(r"\boxed{5}", bad) is False and extract_answer(bad) is None

@pytest.mark.parametrize("unit", ["1,", "x+", "(", "9", r"\frac", r"\text{a}", r"\boxed{1} and ", "or ", "=", "±1", " ", "$", "."])
def test_time_is_linear(unit):
    def best(size):
        response = (r"\boxed{" + unit * (size // len(unit)))[:size - 2] + "5}"
        times = []
        for _ in range(11):
            start = time.process_time()  # not disturbed by what else the machine does
            verify(response, "7+x,8"), verify(response.replace("boxed", "frac"), "7")
            times.append(time.process_time() - start)
        return min(times)

    assert best(1400) < 8 * best(350) + 5e-4  # below the cap on what is parsed; quadratic work would be 16 times as much
    assert best(1_600_000) < 4 * best(800_000) + 5e-3  # beyond the cap on what is read
