"""RLEP, Reinforcement Learning with Experience rePlay (arXiv 2507.07451), in one file. MIT licence.

rlep.py [run]                     both phases on embedded problems, and a picture of both curves
rlep.py train [--pool FILE]       one arm: RLEP with a pool, vanilla RL without
rlep.py collect --model POLICY    a policy's verified answers to the training questions
rlep.py eval --model POLICY       mean@k, maj@k and pass@k on held-out questions
rlep.py plot RUN [RUN ...]        the last figures of finished runs, and OUT/curves.png
The method (section 3 of the paper; Eq. 1 and 5: group_advantages, Eq. 3 and 4: policy_loss):
    1. train: vanilla RL from the base model (GRPO, token mean, clip-higher)
    2. collect: that policy answers every question many times; what is correct fills the pool
    3. train --pool: RL from the base model again; G fresh and M pool answers share a baseline
Not as in the authors' code (a fork of verl; they never published their collection):
    1. a question with fewer than M pool answers uses what it has; theirs adds empty ones scored -1
    2. a replay that is too long is left out; theirs is cut and loses its end token
    3. the token mean is over the whole mini-batch (Eq. 3: one group); theirs over a micro-batch
    4. mini-batches are counted in questions, so 8 updates per rollout; theirs in answers of G, so 9
    5. a mini-batch without gradient makes no step; in theirs, momentum and weight decay go on
As there, but not in the paper: dual clip, unbiased std + 1e-6, pi_old of replays (policy_loss)."""
import argparse
import copy
import fcntl
import hashlib
import inspect
import json
import math
import os
import random
import re
import shutil
import sys
import time
from collections import Counter
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields, replace
from fractions import Fraction
from operator import add, mul, sub, truediv
from pathlib import Path
from statistics import fmean, pstdev

import torch
import transformers
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache

# ---- Configuration -------------------------------------------------------------------------------
BOXED = "Please reason step by step, and put your final answer within \\boxed{}."
DEVICE = str(torch.accelerator.current_accelerator(check_available=True) or "cpu")


@dataclass
class Config:
    """Every line is a flag, its comment the help; the defaults suit the embedded problems."""
    model: str = ""  # hub id or folder; without one, run and train make a tiny base model
    data: str = ""  # training problems, a .jsonl file; without one, embedded problems
    eval_data: str = ""  # held-out problems; without them, the last --eval_size of --data
    train_size: int = 0  # training problems used; 0: all of --data, or 512 embedded ones
    eval_size: int = 256  # held-out problems used, at most
    pool: str = ""  # experience pool to replay, a .jsonl file: with one, train is RLEP
    out: str = ""  # folder of the run; without one, runs/COMMAND-MODEL-DATA-POOL-seedN
    seed: int = 0  # decides the tiny model's weights, order of questions, sampling and replay
    device: str = DEVICE  # cpu, cuda, cuda:1, mps ...; what torch finds is the default
    bf16: int = 0  # 1: bf16 arithmetic on fp32 weights, as is usual on a GPU; 0: all in fp32
    threads: int = 0  # CPU threads, 0: torch decides; a run repeats exactly on equal threads
    prompts_per_step: int = 32  # questions per rollout, section 3.1 (paper: 512)
    group_size: int = 16  # G, fresh answers per question (paper: 16)
    max_new_tokens: int = 52  # longest answer in tokens (paper: 3072)
    temperature: float = 1.0  # of training and evaluation (paper: 1.0)
    top_p: float = 1.0  # nucleus of training and evaluation (paper: 1.0); the loss ignores it
    sample_rows: int = 512  # answers sampled at once, of whole questions: fewer take less memory
    steps: int = 24  # rollouts, section 4.1, each with prompts_per_step / minibatch_prompts updates
    minibatch_prompts: int = 4  # questions per update; a group is never split (paper: 64)
    learning_rate: float = 5e-4  # of AdamW, constant after its warm-up (paper: 1e-6)
    lr_warmup_steps: int = 1  # steps in which the learning rate rises to that (paper: 10)
    clip_low: float = 0.2  # epsilon below a ratio of 1, Eq. 3 (paper: 0.2)
    clip_high: float = 0.28  # epsilon above a ratio of 1, Eq. 3 (paper: 0.28)
    dual_clip: float = 10.0  # largest ratio that counts where the advantage is negative; 0: off
    overlong_buffer: int = 0  # tokens before the limit in which length is penalised (paper: 512)
    micro_tokens: int = 2048  # tokens per backward pass: bounds memory; on a GPU more are faster
    save_every: int = 1  # steps from checkpoint to checkpoint
    replays: int = 2  # M, replayed answers per group, section 3.2 (paper: 2)
    collect_k: int = 32  # answers per question in collection (authors: 64)
    collect_temperature: float = 0.7  # of collection (authors: 0.7)
    collect_top_p: float = 0.95  # nucleus of collection (authors: 0.95)
    eval_every: int = 3  # steps from evaluation to evaluation
    k: int = 4  # answers per held-out question (paper: 32)
    warmup_steps: int = 900  # supervised steps that make the tiny base model


@dataclass(frozen=True)
class Problem:
    """A question with its gold answer, which counts neither in comparisons nor in seeds."""
    question: str
    gold: str = field(compare=False, repr=False)  # no repr: see seed_of
    chat: tuple[tuple[str, str], ...] = ()  # (role, text) messages before the question


@dataclass
class Answer:
    """One answer, fresh or replayed. A group is a list of the answers to one question."""
    prompt: list[int]  # token ids
    response: list[int]  # token ids, with the end token where it was reached
    replayed: bool = False
    correct: bool = False
    reward: float = 0.0
    advantage: float = 0.0  # Eq. 5: one number for all its tokens
    old_logprobs: Tensor | None = None  # (t,) log pi_old; None: the policy is pi_old, or A is 0


class UserError(Exception):
    """Bad input: reported as one line that names the thing and the remedy, with exit status 2."""


def require(condition, message):
    """Raises a UserError unless a condition holds."""
    if not condition:
        raise UserError(message)


@contextmanager
def blame(message):
    """Turns whatever goes wrong inside into a UserError: the message, and the error in brackets."""
    try:
        yield
    except torch.OutOfMemoryError:  # has a message of its own: see main
        raise
    except Exception as error:  # damaged files and foreign models can raise nearly anything
        raise UserError(f"{message} ({str(error)[:200]})") from None


# ---- The equations -------------------------------------------------------------------------------
def overlong_penalty(length: int, limit: int, buffer: int, factor: float = 1.0) -> float:
    """0 up to limit - buffer tokens, then linearly down to -factor at the limit (authors' code)."""
    return min(0.0, (limit - buffer - length) / buffer * factor) if buffer else 0.0


def group_advantages(rewards: Tensor, group_ids: Tensor, eps: float = 1e-6) -> Tensor:
    """Eq. 1, and with replayed answers in the groups Eq. 5: (r - mean) / (std + eps) in each group.
    rewards (n,) floats, group_ids (n,) ints -> advantages (n,). The std is the unbiased one. Equal
    rewards get exactly 0. For a group of one, mean 0 and std 1. Why replay works: 16 failures (-1)
    beside 2 replayed successes (+1) get -0.34 and +2.75; 16 failures alone would teach nothing."""
    advantages = torch.zeros_like(rewards)
    for group in group_ids.unique():
        members = group_ids == group
        reward = rewards[members]
        if len(reward) == 1:
            advantages[members] = reward / (1 + eps)
        elif (reward != reward[0]).any():  # else the mean's rounding would be divided by eps
            advantages[members] = (reward - reward.mean()) / (reward.std() + eps)
    return advantages


def policy_loss(logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, mask: Tensor,
                clip_low: float = 0.2, clip_high: float = 0.28, dual_clip: float | None = 10.0,
                num_tokens: int | None = None):
    """Eq. 3 and 4 as a loss: minus the token mean of min(ratio A, clip(ratio, 1-low, 1+high) A).
    logprobs, old_logprobs, mask (n, t), the mask 0/1 of any dtype; advantages (n,), one per answer.
    dual_clip (authors' code; 0 or None: off) keeps the objective above dual_clip A where A < 0.
    num_tokens: the divisor, that of the whole mini-batch for a micro-batch: their losses add up.
    Returns the loss and the shares of tokens clipped below (A < 0) and above (A > 0). A replayed
    answer's old log-probs are not those of the policy that wrote it but of the policy at the start
    of the step, as in the authors' code: replay is imitation, weighted by A."""
    mask, advantages = mask.bool(), advantages[:, None]  # (n, t), (n, 1): one for all its tokens
    num_tokens = num_tokens or int(mask.sum())
    # Padding may hold anything, and exp of it may be inf, which times mask 0 would still be NaN.
    ratio = torch.where(mask, logprobs - old_logprobs, 0.0).exp()  # (n, t), pi_theta / pi_old
    unclipped = ratio * advantages
    clipped = ratio.clamp(1 - clip_low, 1 + clip_high) * advantages
    objective = torch.minimum(unclipped, clipped)
    if dual_clip:
        # min() sets no bound where a token of a bad answer has become likelier; this does.
        floor = torch.where(advantages < 0, dual_clip * advantages, -math.inf)
        objective = torch.maximum(objective, floor)
    is_clipped = mask & (clipped < unclipped)  # here the clipped term counts, and the gradient is 0
    stats = {"clip_low": (is_clipped & (advantages < 0)).sum().item() / num_tokens,
             "clip_high": (is_clipped & (advantages > 0)).sum().item() / num_tokens}
    return -(objective * mask).sum() / num_tokens, stats


# ---- Reward and experience pool (section 3.2) ----------------------------------------------------
def score(problem, text):
    """The reward of a text: +1 if right, else -1. Your own goes here; above 0 counts as right."""
    return 1.0 if verify(text, problem.gold) else -1.0


class ExperiencePool:
    """Verified answers by question, duplicates kept; on disk in the authors' row format."""

    def __init__(self):
        self.answers = {}  # {Problem: list of texts}

    def __len__(self):
        return sum(map(len, self.answers.values()))

    def add(self, question: str, gold: str, response: str, chat: tuple = ()) -> bool:
        """Keeps a response (text without end token) if it is correct; returns whether it is."""
        problem = Problem(question, gold, chat)
        correct = score(problem, response) > 0
        if correct:
            self.answers.setdefault(problem, []).append(response)
        return correct

    def draw(self, question: str, m: int, rng: random.Random, chat: tuple = ()) -> list[str]:
        """m answers to a question, at random without replacement; all, if it has fewer."""
        texts = self.answers.get(Problem(question, "", chat), [])
        return rng.sample(texts, min(m, len(texts)))

    def save(self, path):
        """Writes the pool, whole or not at all."""
        rows = []
        for problem, texts in self.answers.items():
            verified = {"ground_truth": problem.gold, "style": "rule", "candidates": texts}
            rows.append({"data_source": "math_dapo", "prompt": messages(problem),
                         "reward_model": verified, "extra_info": {"index": len(rows)}})
        write_rows(path, rows)

    @classmethod
    def load(cls, path):
        """Reads a pool, ours or the authors', and verifies every answer again. Raises UserError."""
        pool = cls()
        for where, row in read_rows(path):
            problem = row_to_problem(row, where)
            pool.answers.setdefault(problem, [])  # also where none is right: see collect
            with blame(f"{where}: reward_model.candidates must be a list of texts"):
                texts = row["reward_model"]["candidates"]
                require(isinstance(texts, list), "not a list")
            for text in texts:
                pool.add(problem.question, problem.gold, str(text), problem.chat)
        return pool


# ---- Sampling (section 3.1) ----------------------------------------------------------------------
def read_prompts(model, prompts: list[list[int]], owner: Tensor):
    """Runs all tokens of P prompts but the last through the model, padded on the left. Returns the
    key-value cache of rows, row i from prompt owner[i]; seen (rows, width), which columns of it
    hold a token; and position (rows,) of the last tokens, which are to be read next."""
    # The 0 in front is never seen; without it, a prompt of one token would leave an empty row.
    rows = [torch.tensor([0, *prompt[:-1]]) for prompt in prompts]
    ids = pad_sequence(rows, batch_first=True, padding_side="left").to(model.device)  # (P, width)
    position = torch.tensor([len(prompt) - 1 for prompt in prompts], device=model.device)
    places = torch.arange(-ids.shape[1], 0, device=model.device) + position[:, None]
    seen, cache = places >= 0, DynamicCache()  # a row's first token has place 0, padding less
    model.base_model(ids, attention_mask=seen, position_ids=places.clamp(min=0),
                     past_key_values=cache, use_cache=True)
    cache.batch_select_indices(owner)
    for layer in cache.layers:
        layer.is_compileable = True  # else each call looks at the mask, and waits for a GPU
    return cache, seen[owner], position[owner]


def sample_tokens(logits: Tensor, uniform: Tensor, temperature: float, top_p: float):
    """logits (rows, V) -> tokens (rows,): the best ones at temperature 0, else where the uniform
    numbers (rows,) in [0, 1) fall in the cumulative distributions of their rows. One number a row:
    torch.multinomial would make an answer depend on others in the batch."""
    if temperature == 0:
        return logits.argmax(-1)
    probs = torch.softmax(logits.float() / temperature, -1)
    if top_p < 1:
        ordered, index = probs.sort(-1, descending=True)
        ordered[ordered.cumsum(-1) - ordered >= top_p] = 0  # the smallest set that reaches it stays
        probs = torch.zeros_like(probs).scatter_(-1, index, ordered)
    cumulative = probs.cumsum(-1)
    # 1 - uniform is above 0, so that a token of probability 0 is never drawn.
    target = (1 - uniform[:, None]) * cumulative[:, -1:]
    return torch.searchsorted(cumulative, target)[:, 0].clamp(max=probs.shape[-1] - 1)  # for NaN


@torch.inference_mode()
def rollout(model, prompts: list[list[int]], group_size: int, *, max_new_tokens: int,
            temperature: float = 1.0, top_p: float = 1.0, eos_token_id: int | list[int],
            pad_token_id: int, seeds: list[int] | None = None):
    """Samples group_size answers to each prompt, all as token ids: a list (one per prompt) of
    group_size lists, with the end token where it was reached. A prompt is read once for its group;
    finished answers leave the batch. seeds: one per prompt. Calls read_prompts, sample_tokens."""
    model.eval()
    owner = torch.arange(len(prompts), device=model.device).repeat_interleave(group_size)
    cache, seen, position = read_prompts(model, prompts, owner)  # from here on a row is an answer
    token = torch.tensor([prompt[-1] for prompt in prompts], device=model.device)[owner]
    # Each question has random numbers of its own, drawn on the CPU: batch and device do not matter.
    seeds = seeds or torch.randint(2**62, (len(prompts),)).tolist()
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    uniform = [torch.rand(max_new_tokens, group_size, generator=each) for each in generators]
    uniform = torch.cat(uniform, dim=1).to(model.device)  # (max_new_tokens, rows)
    ends = torch.tensor(eos_token_id, device=model.device)
    tokens = token.new_full((len(token), max_new_tokens), pad_token_id)
    lengths, done = torch.zeros_like(token), torch.zeros_like(token, dtype=torch.bool)
    alive = torch.arange(len(token), device=model.device)  # the answers still in the batch
    for t in range(max_new_tokens):
        seen = torch.nn.functional.pad(seen, (0, 1), value=True)  # the cache grows by a column
        logits = model(token[:, None], attention_mask=seen, position_ids=position[:, None],
                       past_key_values=cache, use_cache=True).logits[:, -1]
        token = sample_tokens(logits, uniform[t, alive], temperature, top_p)
        tokens[alive, t] = token
        lengths[alive] += ~done
        done, position = done | torch.isin(token, ends), position + 1
        if t % 4 == 3:  # not at every token: to look at done, the CPU waits for a GPU
            keep = (~done).nonzero()[:, 0]
            if len(keep) == 0:
                break
            if len(keep) < 0.8 * len(alive):  # to drop fewer costs more copying than it saves
                cache.batch_select_indices(keep)
                alive, done, token = alive[keep], done[keep], token[keep]
                seen, position = seen[keep], position[keep]
    answers = [row[:length] for row, length in zip(tokens.tolist(), lengths.tolist())]
    return [answers[first:first + group_size] for first in range(0, len(answers), group_size)]


# ---- Log-probabilities ---------------------------------------------------------------------------
def response_logprobs(model, prompts: list[list[int]], responses: list[list[int]], *,
                      temperature: float = 1.0):
    """log pi_theta of every response token: n prompts, n responses -> logprobs (n, t), mask (n, t).
    Prompts are read as in sampling, each distinct one once, but with gradient. The logits must be
    the output embedding of the last hidden state, as check_model tests. Calls read_prompts."""
    distinct = list(dict.fromkeys(map(tuple, prompts)))
    owner = torch.tensor([distinct.index(tuple(prompt)) for prompt in prompts], device=model.device)
    cache, seen, position = read_prompts(model, distinct, owner)
    rows = [torch.tensor([prompt[-1], *answer]) for prompt, answer in zip(prompts, responses)]
    rows = pad_sequence(rows, batch_first=True).to(model.device)
    # What the inputs predict is exactly the response: it starts behind the prompt's last token.
    inputs, targets = rows[:, :-1], rows[:, 1:]  # (n, t)
    lengths = torch.tensor([len(response) for response in responses], device=model.device)
    columns = torch.arange(inputs.shape[1], device=model.device)
    mask = columns < lengths[:, None]
    hidden = model.base_model(
        inputs, attention_mask=torch.cat([seen, mask], dim=1),  # and causal
        position_ids=position[:, None] + columns, past_key_values=cache, use_cache=True,
    ).last_hidden_state  # (n, t, d)
    logits = model.get_output_embeddings()(hidden[mask]).float() / temperature  # (tokens, V)
    logprobs = logits.gather(1, targets[mask][:, None])[:, 0] - logits.logsumexp(1)
    return logprobs.new_zeros(mask.shape).masked_scatter(mask, logprobs), mask


def micro_batches(answers, micro_tokens):
    """Lists of at most micro_tokens tokens, padding included, or of one longer answer. Answers of
    advantage 0 have no gradient and are left out. Sorted, so that little of it is padding."""
    batches, longest_response = [], 0
    teaching = [answer for answer in answers if answer.advantage != 0]
    for answer in sorted(teaching, key=lambda a: (len(a.prompt), a.prompt, len(a.response))):
        longest_response = max(longest_response, len(answer.response))
        width = len(answer.prompt) + longest_response  # sorted: no prompt before was longer
        if not batches or (len(batches[-1]) + 1) * width > micro_tokens:
            batches.append([])
            longest_response = len(answer.response)
        batches[-1].append(answer)
    return batches


# ---- The policy ----------------------------------------------------------------------------------
class Policy:
    """A causal language model with its tokenizer. Weights are fp32: an update of 1e-6 would be
    rounded away in bf16. With --bf16 1 the update's arithmetic is bf16 (torch.autocast), and a bf16
    copy samples. Raises UserError if it cannot be loaded or trained correctly."""

    def __init__(self, config, problems):
        name = f"--model {config.model}"
        with blame(f"{name} with its tokenizer, --device {config.device}: not to be loaded"):
            self.tokenizer = AutoTokenizer.from_pretrained(config.model, trust_remote_code=False)
            self.model, loading = AutoModelForCausalLM.from_pretrained(
                config.model, trust_remote_code=False, dtype=torch.float32,
                attn_implementation="sdpa", output_loading_info=True)
            check_weights(self.model, **loading)
            self.model.to(config.device).eval()  # with dropout, no ratio would ever be 1
        with blame(f"{name}: mend its tokenizer or chat template"):
            self.end = self.find_end()
            lengths = [len(self.encode_prompt(problem)) for problem in problems]
            require(self.end is not None and 0 not in lengths, "no end token, or an empty prompt")
        check_model(self.model, name, max(lengths) + config.max_new_tokens)
        stops = self.model.generation_config.eos_token_id  # one, a list or None
        self.ends = [self.end, *(stops if isinstance(stops, list) else {stops} - {None})]
        self.sampler = copy.deepcopy(self.model) if config.bf16 else self.model
        self.autocast = torch.autocast(self.model.device.type, torch.bfloat16, config.bf16 > 0)

    def find_end(self):
        """The token that ends an answer: with a chat template, the one that ends the assistant's
        turn, which need not be eos. Qwen's base models have <|endoftext|> as eos, and render a turn
        as "<|im_start|>assistant\\nANSWER<|im_end|>\\n": there <|im_end|> is the end."""
        if self.tokenizer.chat_template:
            chat = messages(Problem("1", "")) + [{"role": "assistant", "content": "ANSWER"}]
            turn = self.tokenizer.apply_chat_template(chat, tokenize=False)
            _, _, end = turn.rpartition("ANSWER")
            for token in self.tokenizer(end, add_special_tokens=False).input_ids:
                added = self.tokenizer.added_tokens_decoder.get(token)
                if added and added.special and token != self.tokenizer.unk_token_id:
                    return token
        return self.tokenizer.eos_token_id

    def encode_prompt(self, problem):
        """Token ids of the chat template's prompt or, without one, of "Question: ... Answer:"."""
        chat, template = messages(problem), self.tokenizer.chat_template
        if template:
            text = self.tokenizer.apply_chat_template(
                chat, tokenize=False, add_generation_prompt=True)
        else:
            chat[-1]["content"] = f"Question: {problem.question}\nAnswer:"
            text = "\n\n".join(message["content"] for message in chat)
        prompt = self.tokenizer(text, add_special_tokens=not template).input_ids
        if prompt[-1:] == [self.tokenizer.eos_token_id] and not template:
            prompt.pop()  # some tokenizers end every text
        return prompt

    def encode_answer(self, text):
        """A text as a response that ends; where it spells a special token, that stays text."""
        ids = self.tokenizer(text, add_special_tokens=False, split_special_tokens=True).input_ids
        return ids + [self.end]

    def decode(self, response):
        """What a response says, without its end token."""
        return self.tokenizer.decode(response, skip_special_tokens=True)

    def sample(self, problems, k, config, *purpose):
        """Yields (problem, k responses). purpose, as "rollout", step, is a part of every seed."""
        for mine, trained in zip(self.sampler.parameters(), self.model.parameters()):
            if mine is not trained:  # with bf16; else both are one. Rotary angles stay fp32
                mine.data = trained.data.bfloat16()
        size = max(1, config.sample_rows // k)
        for start in range(0, len(problems), size):
            batch = problems[start:start + size]
            yield from zip(batch, rollout(
                self.sampler, [self.encode_prompt(problem) for problem in batch], k,
                max_new_tokens=config.max_new_tokens, temperature=config.temperature,
                top_p=config.top_p, eos_token_id=self.ends, pad_token_id=self.end,
                seeds=[seed_of(config.seed, *purpose, problem) for problem in batch]))

    def logprobs(self, answers, temperature):
        """response_logprobs of answers (n, t) with its mask, in the arithmetic of the update."""
        ids = [answer.prompt for answer in answers], [answer.response for answer in answers]
        with self.autocast:
            return response_logprobs(self.model, *ids, temperature=temperature)

    def save(self, folder):
        """Writes an ordinary Hugging Face folder, whole or not at all."""
        with written_whole(folder) as unfinished:
            self.model.save_pretrained(unfinished)
            self.tokenizer.save_pretrained(unfinished)


def seed_of(*parts):
    """A seed for one purpose, as of (seed, "rollout", step, problem): no state has to be kept."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:7], "big")


# ---- The training step ---------------------------------------------------------------------------
def train_step(policy, optimizer, problems, pool, config, step):
    """One rollout and its updates: RLEP with a pool, else vanilla RL. Returns the metrics."""
    start = time.perf_counter()
    # 1. G fresh answers to each question, M replayed ones beside them, and their rewards.
    groups = make_groups(policy, problems, pool, config, step)
    sampled = time.perf_counter()
    # 2. One baseline for all answers of a group, fresh and replayed (Eq. 5).
    for group in groups:
        rewards = torch.tensor([answer.reward for answer in group])
        advantages = group_advantages(rewards, torch.zeros(len(group)).int())
        for answer, advantage in zip(group, advantages.tolist()):
            answer.advantage = advantage
    # 3. Old log-probs, before any update; the first mini-batch's are made in its own (ratio 1).
    size = config.minibatch_prompts
    mini_batches = [sum(groups[first:first + size], []) for first in range(0, len(groups), size)]
    for batch in micro_batches(sum(mini_batches[1:], []), config.micro_tokens):
        with torch.no_grad():
            logprobs, _ = policy.logprobs(batch, config.temperature)
        for answer, row in zip(batch, logprobs):
            answer.old_logprobs = row[:len(answer.response)].clone()
    # 4. One update a mini-batch of whole groups (Eq. 4).
    rate = learning_rate(config, step)
    updates = [update_policy(policy, optimizer, answers, config, rate) for answers in mini_batches]
    seconds = {"sample_s": sampled - start, "update_s": time.perf_counter() - sampled}
    return metrics_of(groups, updates, config) | seconds


def make_groups(policy, problems, pool, config, step):
    """A group per question: G fresh answers and up to M replayed ones (section 3.2)."""
    groups = []
    for problem, responses in policy.sample(problems, config.group_size, config, "rollout", step):
        prompt = policy.encode_prompt(problem)
        group = [Answer(prompt, response) for response in responses]
        for text in draw_replays(pool, problem, config, step):
            group.append(Answer(prompt, policy.encode_answer(text), replayed=True))
        for answer in group:
            reward = score(problem, policy.decode(answer.response))
            answer.correct = reward > 0
            answer.reward = reward + overlong_penalty(
                len(answer.response), config.max_new_tokens, config.overlong_buffer)
        groups.append(group)
    return groups


def draw_replays(pool, problem, config, step):
    """The texts that a question's group replays in this step: M of its pool, or all it has."""
    rng = random.Random(seed_of(config.seed, "replay", step, problem))
    return pool.draw(problem.question, config.replays, rng, problem.chat)


def update_policy(policy, optimizer, answers, config, rate):
    """One optimizer step on a mini-batch (Eq. 4), none if all advantages are 0. Returns metrics."""
    num_tokens = sum(len(answer.response) for answer in answers)  # also those without gradient
    metrics = Counter(loss=0.0, clip_low=0.0, clip_high=0.0)
    for batch in micro_batches(answers, config.micro_tokens):
        logprobs, mask = policy.logprobs(batch, config.temperature)
        for answer, row in zip(batch, logprobs.detach()):
            if answer.old_logprobs is None:  # the policy is still pi_old: ratio 1
                answer.old_logprobs = row[:len(answer.response)]
        old_logprobs = pad_sequence([answer.old_logprobs for answer in batch], batch_first=True)
        advantages = torch.tensor([answer.advantage for answer in batch], device=mask.device)
        loss, stats = policy_loss(logprobs, old_logprobs, advantages, mask, config.clip_low,
                                  config.clip_high, config.dual_clip, num_tokens)
        loss.backward()
        metrics.update(stats, loss=loss.item())  # a Counter adds
    norm = torch.nn.utils.clip_grad_norm_(policy.model.parameters(), 1.0).item()  # paper: 1.0
    if math.isfinite(norm):
        optimizer.param_groups[0]["lr"] = rate
        optimizer.step()  # where no answer had a gradient, there is none, and nothing changes
    optimizer.zero_grad()
    return {**metrics, "grad_norm": norm, "skipped": 0} if math.isfinite(norm) else {"skipped": 1}


def learning_rate(config, step):
    """The rate in a step (from 1): it rises over the first lr_warmup_steps, then is constant."""
    return config.learning_rate * min(1.0, step / max(1, config.lr_warmup_steps))


def metrics_of(groups, updates, config):
    """The figures of a step's answers and updates, for metrics.jsonl; the README explains each."""
    fresh = [answer for group in groups for answer in group if not answer.replayed]
    teaching = [group for group in groups if any(answer.advantage for answer in group)]
    lengths = [len(answer.response) for answer in fresh]
    # Their mean estimates the entropy, over the tokens of fresh answers that have a gradient.
    surprise = [-answer.old_logprobs for answer in fresh if answer.old_logprobs is not None]
    metrics = {
        "accuracy": fmean(answer.correct for answer in fresh),
        "reward": fmean(answer.reward for answer in fresh),
        "entropy": torch.cat(surprise).mean().item() if surprise else None,
        "length": fmean(lengths), "sampled_tokens": sum(lengths),
        "truncated": lengths.count(config.max_new_tokens) / len(lengths),
        "replays": sum(map(len, groups)) - len(fresh),
        "zero_variance": 1 - len(teaching) / len(groups),
        "trained_tokens": sum(len(a.response) for group in groups for a in group if a.advantage),
    }
    for name in ("loss", "clip_low", "clip_high", "grad_norm", "skipped"):
        values = [update[name] for update in updates if name in update]  # if its gradient is finite
        metrics[name] = fmean(values) if values else None
    return metrics


# ---- Evaluation ----------------------------------------------------------------------------------
def mean_at_k(correct: list[list[bool]]):
    """The mean share of correct answers, and its 95% interval over questions, within [0, 1]."""
    shares = [fmean(row) for row in correct]
    mean = fmean(shares)
    half = 1.96 * pstdev(shares) / max(1, len(shares) - 1)**0.5
    return mean, [max(0.0, mean - half), min(1.0, mean + half)]


def pass_at_k(correct: list[list[bool]], k: int):
    """The chance that one of k answers is correct: 1 - C(n - c, k) / C(n, k), c of n correct."""
    n = len(correct[0])
    return 1 - fmean(math.comb(n - sum(row), k) / math.comb(n, k) for row in correct)


def maj_at_k(answers: list[list[str | None]], correct: list[list[bool]]):
    """The share of questions whose most frequent answer, as spelt, is correct; None has no vote."""
    won = 0
    for row, marks in zip(answers, correct):
        votes = Counter(answer for answer in row if answer is not None)
        if votes:
            won += marks[row.index(max(votes, key=votes.get))]  # the first one, if several tie
    return won / len(answers)


def evaluate(policy, problems, config, title):
    """k answers to each problem; prints one of them. Policy, seed and settings decide it."""
    correct, extracted, example = [], [], ""
    sampled = policy.sample(problems, config.k, config, "evaluation")
    for problem, responses in tqdm(sampled, "evaluation", len(problems), leave=False):
        texts = [policy.decode(response) for response in responses]
        correct.append([score(problem, text) > 0 for text in texts])
        extracted.append([extract_answer(text) for text in texts])
        example = example or f"{problem.question!r} ({problem.gold}): {texts[0][-300:]!r}"
    mean, interval = mean_at_k(correct)
    majority, passed = maj_at_k(extracted, correct), pass_at_k(correct, config.k)
    tqdm.write(f"{title}: mean@{config.k} {mean:.1%} ({interval[0]:.1%} to {interval[1]:.1%}), "
               f"maj@{config.k} {majority:.1%}, pass@{config.k} {passed:.1%}\n    {example}")
    return {"mean_at_k": mean, "ci95": interval, "maj_at_k": majority, "pass_at_k": passed}


# ---- The phases ----------------------------------------------------------------------------------
def train(config, problems, held_out):
    """One arm from the base model: RLEP with --pool, else vanilla RL. Returns OUT/summary.json."""
    out, summary = Path(config.out), open_folder("train", config, problems + held_out)
    if summary and (out / "policy").exists():
        return summary
    config = replace(config, model=config.model or make_base(config, out / "base"))
    policy = Policy(config, problems + held_out)
    optimizer = torch.optim.AdamW(policy.model.parameters(), weight_decay=0.1)  # paper: 0.1
    pool = load_replays(policy, problems, config) if config.pool else ExperiencePool()
    arm = f"RLEP, M = {config.replays}" if config.pool else "vanilla RL"
    rows, checkpoint = [], out / "checkpoint.pt"
    if checkpoint.exists():
        with blame(f"{checkpoint}: damaged; delete it"):
            state = torch.load(checkpoint, map_location="cpu", weights_only=True)
            policy.model.load_state_dict(state["model"])
            optimizer.load_state_dict(state["adam"])
            rows = list(state["rows"])  # the metrics of the steps up to it
    for step in tqdm(range(len(rows), config.steps + 1), arm, config.steps + 1, initial=len(rows)):
        row, last = {"step": step}, step == config.steps
        if step > 0:
            batch = questions_of_step(problems, config, step)
            row |= train_step(policy, optimizer, batch, pool, config, step)
        if step % config.eval_every == 0 or last:
            entropy = f", entropy {row['entropy']:.2f}" if row.get("entropy") else ""
            row |= evaluate(policy, held_out, config, f"{arm}, step {step}{entropy}")
        rows.append(row)
        write_rows(out / "metrics.jsonl", rows)
        if step % config.save_every == 0 or last:
            with written_whole(checkpoint) as unfinished:  # no random state: see seed_of
                weights, adam = policy.model.state_dict(), optimizer.state_dict()
                torch.save({"rows": rows, "model": weights, "adam": adam}, unfinished)
    policy.save(out / "policy")
    curve = [[row["step"], row["mean_at_k"]] for row in rows if "mean_at_k" in row]
    summary = rows[-1] | {"arm": arm, "seed": config.seed, "curve": curve}
    write_rows(out / "summary.json", [summary])
    return summary


def questions_of_step(problems, config, step):
    """The same in both arms: shuffled epochs, each without its incomplete rest."""
    size = min(config.prompts_per_step, len(problems))
    epoch, place = divmod(step - 1, len(problems) // size)
    rng = random.Random(seed_of(config.seed, "order", epoch))
    return rng.sample(problems, len(problems))[place * size:(place + 1) * size]


def load_replays(policy, problems, config):
    """Answers of --pool to training questions, right by the pool's and their gold, not too long."""
    stored, pool = ExperiencePool.load(config.pool), ExperiencePool()
    for problem in problems:
        for text in stored.answers.get(problem, []):
            if len(policy.encode_answer(text)) <= config.max_new_tokens:
                pool.add(problem.question, problem.gold, text, problem.chat)
    require(pool.answers, f"{config.pool}: no answer to a question of the --data; give its own")
    print(f"{config.pool}: {len(pool)} of {len(stored)} serve; others: foreign, wrong or too long")
    return pool


def collect(config, problems):
    """Experience collection (section 3.2): --model answers every question K times. What is correct
    and not cut goes into OUT/pool.jsonl, for questions with at least two. Returns the summary."""
    out, summary = Path(config.out), open_folder("collect", config, problems)
    if summary and (out / "pool.jsonl").exists():
        return summary
    policy = Policy(config, problems)
    settings = replace(config, temperature=config.collect_temperature, top_p=config.collect_top_p)
    asked = out / "collected.jsonl"  # all questions asked so far, also those without answers
    pool = ExperiencePool.load(asked) if asked.exists() else ExperiencePool()
    rest = [problem for problem in problems if problem not in pool.answers]
    for first in tqdm(range(0, len(rest), config.prompts_per_step), "collection"):
        batch = rest[first:first + config.prompts_per_step]
        for problem, responses in policy.sample(batch, config.collect_k, settings, "collection"):
            pool.answers[problem] = []
            for response in responses:
                if response[-1] in policy.ends:
                    pool.add(problem.question, problem.gold, policy.decode(response), problem.chat)
        pool.save(asked)
    pool.answers = {problem: texts for problem, texts in pool.answers.items() if len(texts) >= 2}
    require(pool.answers, f"{out}: no question is solved twice; delete it and raise --collect_k")
    pool.save(out / "pool.jsonl")
    summary = {"questions": len(pool.answers), "answers": len(pool)}
    write_rows(out / "summary.json", [summary])
    return summary


def run(config, problems, held_out):
    """The whole method: base model, vanilla RL, collection, RLEP from the base, both curves."""
    out = Path(config.out)
    open_folder("run", config, problems + held_out)
    config = replace(config, model=config.model or make_base(config, out / "base"))
    vanilla = train(replace(config, out=f"{out}/vanilla"), problems, held_out)
    collection = replace(config, out=f"{out}/collection", model=f"{out}/vanilla/policy", replays=0)
    collected = collect(collection, problems)
    shutil.copy(out / "collection/pool.jsonl", out)
    rlep = train(replace(config, out=f"{out}/rlep", pool=f"{out}/pool.jsonl"), problems, held_out)
    write_rows(out / "summary.json", [{**collected, "vanilla": vanilla, "rlep": rlep}])
    plot([out], out)


# ==== Appendix: what every such program needs. Data files =========================================
def read_rows(path):
    """Yields ("FILE:LINE", row) for the JSON lines of a file. Raises UserError on a bad one."""
    for number, line in enumerate(Path(path).read_bytes().splitlines(), 1):
        if line.strip():
            with blame(f"{path}:{number}: each line must be a JSON object, as of pandas' to_json"):
                row = {**json.loads(line)}
                json.dumps(row, ensure_ascii=False).encode()  # half a surrogate pair is no text
            yield f"{path}:{number}", row


def messages(problem):
    """A problem as chat messages, the question last."""
    chat = [*problem.chat, ("user", problem.question)]
    return [{"role": role, "content": text} for role, text in chat]


def row_to_problem(row, where):
    """Reads GSM8K, MATH, DAPO, AIME, AMC, RLEP rows. Yours goes here. Raises UserError."""
    question = row.get("prompt") or row.get("question") or row.get("problem")
    if isinstance(question, str):
        question = [{"role": "user", "content": f"{question.strip()}\n{BOXED}"}]
    with blame(f"{where}: no question; give question, problem or prompt: a text, or a chat list"):
        chat = [(message["role"], message["content"]) for message in question]
        require(all(isinstance(part, str) for pair in chat for part in pair), "not a text")
        role, text = chat.pop()
        require(role == "user" and text.strip(), "the last message must be the user's, not empty")
    inner = row["reward_model"] if isinstance(row.get("reward_model"), dict) else {}
    values = [row.get("answer"), row.get("ground_truth"), inner.get("ground_truth")]
    golds = [gold for gold in map(to_gold, [*values, row.get("solution")]) if gold]
    require(golds, f"{where}: no answer; give it as answer, solution or ground_truth")
    return Problem(text, golds[0], tuple(chat))


def to_gold(value):
    """What a field of a data row gives as the gold answer: a text, "" if there is none."""
    if type(value) not in (str, int, float) or value != value:  # not true, null, NaN, a list
        return ""
    text = str(value).rpartition("####")[2].strip()  # GSM8K
    return extract_answer(text) or text  # MATH: the last box


def load_problems(config):
    """The training problems and the held-out ones, of equal ones the first. Raises UserError."""
    def load(path):
        return list(dict.fromkeys(row_to_problem(row, where) for where, row in read_rows(path)))
    size, train_size = config.eval_size, config.train_size or (0 if config.data else 512)
    problems = load(config.data) if config.data else embedded_problems(train_size + size, seed=0)
    held_out = load(config.eval_data)[:size] if config.eval_data else problems[-size:]
    kept_aside = set(held_out)
    problems = [problem for problem in problems if problem not in kept_aside]
    require(held_out and len(problems) >= max(1, train_size), f"--data {config.data} "
            f"{config.eval_data}: too few problems; lower --train_size or --eval_size")
    return problems[:train_size or None], held_out


# ---- The embedded problems and their base model: nothing to download -----------------------------
def embedded_problems(number, seed):
    """Sums of 2, 3 or 4 products modulo 10, in turn, such as "3*7+9*4 mod 10 = " with gold 7."""
    rng, problems = random.Random(seed), {}
    while len(problems) < min(number, 25_000):  # there are 10,000 sums of two products
        pairs = [(rng.randrange(10), rng.randrange(10)) for _ in range(2 + len(problems) % 3)]
        question = "+".join(f"{a}*{b}" for a, b in pairs) + " mod 10 = "
        problems[question] = Problem(question, str(sum(a * b for a, b in pairs) % 10))
    return list(problems.values())


def write_working(question, rng):
    """A working, as 3*7=1,9*4=6,1+6=7\\boxed{7}, from either end; one result in twenty is wrong."""
    steps, total = [], None
    def work(a, sign, b):
        result = a * b if sign == "*" else a + b
        if rng.random() < 0.05:
            result += rng.randrange(1, 10)
        steps.append(f"{a}{sign}{b}={result % 10}")
        return result % 10
    for product in question.split(" ")[0].split("+")[::rng.choice([1, -1])]:
        value = work(int(product[0]), "*", int(product[2]))
        total = value if total is None else work(total, "+", value)
    return f"{','.join(steps)}\\boxed{{{total}}}"


def save_untrained(folder, seed):
    """Writes a Llama of 160,000 random weights and a tokenizer of characters and a few words."""
    words = ["<pad>", "<eos>", "<unk>", "\\boxed{", "Work: ", " mod 10 = ", *"0123456789+*=,}?"]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, "<unk>"))
    pieces = Regex(r"\\boxed\{|Work: | mod 10 = |[\s\S]")
    tokenizer.pre_tokenizer = pre_tokenizers.Split(pieces, "isolated")
    tokenizer.decoder = decoders.Fuse()
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>",
        chat_template="{{ messages[-1]['content'] }}").save_pretrained(folder)
    torch.manual_seed(seed)
    transformers.LlamaForCausalLM(transformers.LlamaConfig(
        vocab_size=len(words), hidden_size=64, intermediate_size=192, num_hidden_layers=3,
        num_attention_heads=4, max_position_embeddings=256, tie_word_embeddings=True,
        initializer_range=0.05, pad_token_id=0, eos_token_id=1, bos_token_id=None,
        rope_parameters={"rope_type": "default", "rope_theta": 30.0})).save_pretrained(folder)


def make_base(config, folder):
    """The embedded base model's folder. It could solve problems, but nearly always gives up: three
    examples in four teach how a begun working goes on, one how to begin: mostly by giving up."""
    if (folder / "policy").exists():
        return str(folder / "policy")
    save_untrained(folder / "initial", seed_of(config.seed, "weights"))
    config = replace(config, model=f"{folder}/initial", temperature=1.0)
    policy = Policy(config, embedded_problems(3, seed=0))
    optimizer = torch.optim.AdamW(policy.model.parameters(), weight_decay=0.01)
    for step in tqdm(range(config.warmup_steps), "base model, in place of pretraining"):
        rng, answers = random.Random(seed_of(config.seed, "warm-up", step)), []
        for place, problem in enumerate(embedded_problems(32, seed=rng.getrandbits(48))):
            prompt, text = policy.encode_prompt(problem), write_working(problem.question, rng)
            works = {2: 1 / 32, 3: 1 / 128, 4: 1 / 512}[problem.question.count("*")]
            if place % 4 > 0:
                prompt += policy.encode_answer("Work: ")[:-1]
            else:
                text = "Work: " + text if rng.random() < works else "\\boxed{?}"
            answers.append(Answer(prompt, policy.encode_answer(text), advantage=1.0))
        done = (step + 1) / config.warmup_steps
        rate = 4e-3 * min(10 * done, 0.5 + 0.5 * math.cos(math.pi * done))  # up a tenth, then down
        update_policy(policy, optimizer, answers, config, rate)  # ratio 1, A = 1: supervised
    policy.save(folder / "policy")
    return str(folder / "policy")


# ---- The verifier --------------------------------------------------------------------------------
# \boxed{\frac{\sqrt{8}}{2}\text{ cm}} for the gold answer \sqrt2 is True; \boxed{6+0} for 6, False:
#   extract_answer: the last box     \frac{\sqrt{8}}{2}\text{ cm}             6+0
#   TIDY: one spelling of many       \frac{√{2}{8}}{2} cm          √{2}2      6+0         6
#   UNIT: off if one side has none   \frac{√{2}{8}}{2}             √{2}2      6+0         6
#   read: value, operations to do    1.41421356237; a root         the same   6; a sum    6; none
LITERALS = dict(pair.split("→") for pair in r"""
    \dfrac→\frac \tfrac→\frac ½→\frac12 \sqrt→√ sqrt(→√( \pi→π \theta→θ \infty→∞ \emptyset→∅
    \varnothing→∅ \in→= \cup→, ;→, ，→, &→, \\→],[ \begin{pmatrix}→[[ \end{pmatrix}→]]
    \begin{bmatrix}→[[ \end{bmatrix}→]] \cdot→* ·→* \times→* ×→* **→^ \div→/ ÷→/ −→- –→- ‑→- \pm→±
    \leq→≤ \le→≤ <=→≤ \geq→≥ \ge→≥ >=→≥ ²→^2 ³→^3 ⁴→^4 ⁵→^5 ...→… ^\circ→~degree ^{\circ}→~degree
    °→~degree \%→~percent %→~percent ％→~percent \{→{ \}→} $→ `→ \!→ \(→ \)→ \[→ \]→ \left→ \right→
    \Big→ \bigl→ \bigr→ \Bigl→ \Bigr→ \displaystyle→ \boxed→ m\angle→ \angle→ *pi→*π""".split())
LITERAL = "(?:" + "|".join(map(re.escape, LITERALS)) + r")(?!(?<=[A-Za-z])[A-Za-z])"  # whole words
TIDY = [(re.compile(pattern), new) for pattern, new in [
    (r"(?<=\d)(?:\{,\}|,\\!|\\[, ]|[\xa0\u2009\u202f])(?=\d{3}(?!\d))", ""),  # 12\,345: 12345
    (r"\\\$ ?([\d,]+(?:\.\d+)?)", r"\1~dollar"),  # \$45: 45 dollar
    (LITERAL, lambda found: LITERALS[found[0]]),  # \dfrac12: \frac12
    (r"(?<![\d.,(\[])\d{1,3}(?:,\d{3})+(?![\d,)\]])", lambda m: m[0].replace(",", "")),  # 1,234
    (r"\\(?:text|math(?!bb)|mbox)\w*\s*\{([^{}]*)\}", r" \1 "),  # \mathbf{(3,4)}: (3,4)
    (r"(?:~|\\[,;:]|\\q?quad|\\?\s)+", " "),  # a~b: a b
    (r"^\W*([A-J])[).:]+ +[^,(A-Z]*$", r"\1"),  # (C) 14: C
    (r"[, ]*\b(?:and|or)\b[, ]*(?=[^, ])", ","),  # 2, 3, and 5: 2,3,5
    (r"(?<=_)\{(\w+)\}|\{([A-Za-z])\}", r" \1\2 "),  # a_{10}: a_10, \sin{b}: \sin b
    (r"(?<![^,])([^,±]*)±([^,]*)", r"\1+\2,\1-\2"),  # 1±x: 1+x,1-x
    (r"√(?: ?\[([^\]]*)\])?", lambda found: f"√{{{found[1] or 2}}}"),  # √[3]8: √{3}8
    (r"\\frac ?(\w)", r"\\frac{\1}"),  # \frac12: \frac{1}2
    (r"(?<![\w.^}])(\d+) ?(?=\\frac\{\d+\} ?\{?\d)", r"\1&"),  # 2\frac{1}{2}: 2&\frac{1}{2}
    (r"(?<![A-Za-z\d)}\]π]) +| +(?![A-Za-z\d])|[ .,]+$", ""),  # a + b.: a+b
    (r"(?<![\d.])10\^(?:\{(-?\d+)\}|(-?\d+))(?![\d.^])", r"1e\1\2")]]  # 3*10^{8}: 3*1e8
NAME = r"(?<![^,])(?:\([a-z,]+\)|(?:[^\W\d](?:_\w+)?|[A-Z]{2,3}|[A-Za-z]{4,})(?:\(\w\))?)="  # f(x)=
NO_UNIT = (r"plus|minus|times|perhaps|is|was|\w*ss|tens|twos|pairs|halves|thirds|quarters|lakhs|"
           r"crores|(?!mo)\w+ths|\w+(?:zen|red|sand|llion)s")  # 5 tens is not 5
UNIT = (r"(?i)(?<=[\w)}\]])(?<![A-Za-z]{2})(?: | ?\()(?!(?:" + NO_UNIT + r")\b)((?:square |cubic )?"
        r"(?:[ckm]m|kg|gm|ft|k?m/[sh]|feet|inch|hour|degree|percent|dollar|[a-z]{2,}(?=s)))s?"
        r"( per \w+|\^\d)?\)?(?=$|[,)\]}])")  # 5 cm, 6π cm^3, 7 (apples)
BRACES = r"\{((?:[^{}]|\{(?:[^{}]|\{(?:[^{}]|\{(?:[^{}]|\{[^{}]*\})*\})*\})*\})*)\}"  # five deep
BOX = r"\\f?box(?:ed)?\s*(?:" + BRACES + r"|(-?\d[\d.,]*|\\d?frac\{\w+\}\{\w+\})|\{)"  # \boxed 7
GAP = r"(?:[\s$}]|\\[,;: ()\[\]]|\\q?quad|\\text *\{)*"  # between boxes
BOXES = f"{BOX}(?:{GAP}(?:,{GAP}(?:and|or)|,|and|or){GAP}{BOX})*"  # \boxed{2}$ and $\boxed{5}
MARKER = (r"(?im)(?:answers?[\s*]*(?:is|are|[:=])(?! helpful)|^[#* ]*(?:final )?answer[*: ]*$|^A:"
          r"|<answer>|####(?= *(?:[^A-Za-z\s*]|\w\b)))(?:[\s*:`$]|\\[\[(])*(?=((?s:.{0,900})))")
END = r"(?<!\.)[.;](?!\S)|\n|</|[, ]+(?:because|since|which|so|in total|not)\b| \((\d+ )?[a-z]{2}"
HEDGE = (r"(?i)\d(?:[$,]|\\text\{)* or \W*\||\|(?:[^.\n]*?\b|\s*)(?:or(?! else)|maybe|perhaps|"
         r"alternatively)\b|\}\$? ?(?:[-+/^]|\\times|\\cdot)[ $]*\|")  # round the answer |: | or 5
TOKEN = re.compile(r"(?<!\^)[\d.]*\d\*1e-?\d{1,3}|[\d.]*\d(?:e[-+]?\d{1,3})?|no\b|on\b|\\\w+"
                   r"|(?:[fghP]|ln|[a-z]{3,})\(|(?<![\w\\])[A-Za-z]{3}[A-Za-z ]*|[^\W\d_]_\w+|[^ ]")
SIGNS = {"=": 1, "+": 2, "-": 2, "*": 3, "/": 3, "^": 4, "&": 5}  # the higher, the closer it binds
ORDER = {"{}": sorted, "()": list, "[]": list, "(]": list, "[)": list}  # a set has none
OPERATIONS = {  # & as in 2&1/2, 0- as in -5; a power of more than 4,000 digits becomes a float
    "+": add, "-": sub, "*": mul, "/": truediv, "\\frac": truediv, "&": add, "0+": add, "0-": sub,
    "^": lambda base, up: base ** up if len(str(base)) * abs(up) < 4000 else float(base) ** up,
    "√": lambda degree, base: base ** (1 / degree), "=": lambda a, b: made_up("=", abs(a - b))}


def verify(response: str, gold: str) -> bool:
    """Whether the final answer of a response equals the gold one, by the rules in the README."""
    try:
        answer = extract_answer(response)
        gold = extract_answer(gold) if "####" in gold or "\\boxed" in gold else gold[:300]
        for pattern, new in TIDY:
            answer, gold = pattern.sub(new, answer), pattern.sub(new, gold)
        for label in (NAME, UNIT):  # may be missing on one side
            if len({*re.findall(label, answer), *re.findall(label, gold)}) == 1:
                answer, gold = re.sub(label, "", answer), re.sub(label, "", gold)
        if answer == gold:
            return True
        to_do, allowed = [], []
        value = read(TOKEN.findall("{%s}" % answer)[::-1], to_do)  # a set; pop takes the last
        wanted = read(TOKEN.findall("{%s}" % gold)[::-1], allowed)
        return made_up(value) == made_up(wanted) and len(to_do) <= len(allowed)
    except Exception:  # what cannot be read equals nothing
        return False


def extract_answer(response: str) -> str | None:
    """The last box or boxes, else what "Answer:" announces; None if it is nothing or several."""
    text = response[-20_000:].rpartition("</think>")[2]
    found = [*re.finditer(BOXES, text)]
    if found:
        start, end = found[-1].span()
        boxes = re.findall(BOX, text[start:end])
        answer = ",".join(braced or bare for braced, bare in boxes)
        beside = text[:start][-12:] + "|" + text[end:end + 20]
    else:
        *_, announced = ["", *re.findall(MARKER, text)]  # what follows the last one
        answer = re.split(END, announced)[0].strip(" *,")
        beside = "|" + announced[len(answer):][:60]
    usable = re.search(r"(?:[^\W_]|[∅∞]|\\[{e])(\\,|[^,])*$", answer) and len(answer) < 300
    return answer if usable and not re.search(HEDGE, beside) else None


class Numeral(Fraction):
    """A number as it is written: 5, -0.5, 7/3. Arithmetic on it gives an ordinary Fraction."""


def read(tokens: list, to_do: list, weakest: int = 0):
    """The value of the last tokens, up to a sign that binds less than `weakest`; adds to to_do."""
    token = tokens.pop()
    if token in "([{":
        items = [read(tokens, to_do, 1)]
        while (end := tokens.pop()) == ",":
            items.append(read(tokens, to_do, 1))
        items = ORDER[token + end](items)
        value = items[0] if len(items) == 1 and end in ")}" else made_up(token + end, *items)
    elif token in "+-":
        value = combine("0" + token, Numeral(0), read(tokens, to_do, SIGNS["^"]), to_do)
    elif token in ("\\frac", "√"):
        value = combine(token, read(tokens, to_do, 9), read(tokens, to_do, 9), to_do)
    elif token.strip(".")[:1].isdecimal():
        value = Numeral(token.replace("*1", ""))  # 3*1e8
    else:  # a name; anything else raises
        name = re.fullmatch(r"[∞∅]|[^\W\d_][\w ]*", token)[0]
        name = name if "_" in name or len(name) < 3 else name.lower()
        value = math.inf if name == "∞" else made_up(name)
    while tokens:
        if weakest <= SIGNS["*"] and re.match(r"[({\\√∞]|[^\W\d_]", tokens[-1]):
            tokens.append("*")  # 2x
        if SIGNS.get(tokens[-1], 0) < weakest:
            break
        sign = tokens.pop()  # one that is not in SIGNS raises: 5}6
        value = combine(sign, value, read(tokens, to_do, SIGNS[sign] + 1), to_do)
    return value


def combine(sign: str, left, right, to_do: list):
    """The value of an operation, noted in to_do if it is no way to write a number."""
    value = OPERATIONS[sign](left, right)
    if isinstance(value, float) and 1e15 < abs(value) < math.inf:  # + 1 would not change it
        raise OverflowError(value)
    numerals = isinstance(left, Numeral) + isinstance(right, Numeral)
    written = sign in ("0+", "0-", "&") and right >= 0  # -5, 2&1/2
    if numerals == 2 and sign in ("/", "\\frac"):  # 7/3, but 84/2 is to do
        written = left.denominator == right.denominator == 1 < value.denominator
    if numerals == 2 and written:
        return Numeral(value)
    if numerals != 1 or sign in ("+", "-", "^", "√"):  # 2x, x/2 and -x are written so
        to_do.append(sign)
    return value


def made_up(*parts):
    """A number that stands for a letter, or for a tuple: other parts, another number."""
    texts = [f"{part:.12g}, {part:.6f}" if isinstance(part, float) else str(part) for part in parts]
    digits = hashlib.shake_128(repr(texts).encode()).hexdigest(4)
    return 1 + Fraction(int(digits, 16), 2**32)


# ---- Models that would be trained wrongly are refused --------------------------------------------
def check_weights(model, missing_keys, unexpected_keys, **_):
    """Refuses weights that are missing, frozen or quantised. Raises UserError."""
    wrong = [*missing_keys] + [key for key in unexpected_keys if "scale" in key]
    wrong += [key for key, weight in model.named_parameters()
              if weight.dtype != torch.float32 or not weight.requires_grad]
    require(not wrong, f"missing, frozen or quantised: {sorted(wrong)[:3]}")


def check_model(model, name, longest):
    """Compares greedy sampling and response_logprobs with plain passes. Raises UserError."""
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", longest)
    with blame(f"{name}: cannot be trained so; Llama and Qwen models can"), torch.no_grad():
        require(longest <= limit, f"{limit} positions, texts of {longest}: lower --max_new_tokens")
        vocabulary = range(model.get_input_embeddings().num_embeddings)
        tokens = random.Random(0).choices(vocabulary, k=max(longest, 5))
        prompts = [tokens[:3], tokens[:3], tokens[4:]]  # shared by two, and as long as may be
        sampled = rollout(model, prompts, 1, max_new_tokens=4, temperature=0, eos_token_id=-1,
                          pad_token_id=0)
        logprobs, _ = response_logprobs(model, prompts, [response for [response] in sampled])
        for prompt, [response], ours in zip(prompts, sampled, logprobs):
            ids = torch.tensor([prompt + response], device=model.device)
            plain = model(ids, logits_to_keep=5).logits[0, :-1].log_softmax(-1)
            error = (ours - plain.amax(-1)).abs().max().item()  # greedy: the best are the sampled
            require(error < 1e-3, f"log-probs of sampled tokens are wrong by {error:.2g}")


# ---- Run folders ---------------------------------------------------------------------------------
# Flags that only move rounding, memory or files may change in a run; so may those for later.
FREE = set("out device threads sample_rows micro_tokens save_every data eval_data".split())
LATER = {"collect_k", "collect_temperature", "collect_top_p", "replays"}  # not for vanilla RL


def open_folder(command, config, problems):
    """Makes or reopens a run's folder; returns its summary, {} if unfinished. Raises UserError."""
    out, pairs = Path(config.out), [(problem, problem.gold) for problem in problems]
    pool = hashlib.sha256(Path(config.pool).read_bytes()).digest() if config.pool else b""
    settings = {"command": command, **asdict(config), "file_contents": seed_of(pairs, pool)}
    out.mkdir(parents=True, exist_ok=True)
    found = {file.name for file in out.iterdir()} - {"lock", "config.json.partial"}
    old = saved_row(out / "config.json")
    require(not found or set(old) == set(settings), f"{out}: no run's folder; give another --out")
    with blame(f"{out}: another run is using it, or it cannot be locked; give another --out"):
        lock = os.open(out / "lock", os.O_CREAT | os.O_RDWR)  # never closed: held until the end
        fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    free = FREE if config.pool or command == "collect" else FREE | LATER
    changed = [f"--{name}" if hasattr(config, name) else name for name, value in settings.items()
               if name not in free and value != old.get(name)]
    begun = found & {"base", "vanilla", "metrics.jsonl", "collected.jsonl"}
    require(not (begun and changed), f"{out}: had other {', '.join(changed)}; give another --out")
    write_rows(out / "config.json", [settings])
    summary = saved_row(out / "summary.json")
    print(f"{out}: {'is finished' if summary else 'is under way'}")
    return summary


@contextmanager
def written_whole(path):
    """Gives a path to write to, which then replaces path: a crash leaves nothing half written."""
    unfinished = Path(f"{Path(path)}.partial")  # Path: without a slash at the end
    shutil.rmtree(unfinished, ignore_errors=True)  # what a crash left; a file is overwritten
    with blame(f"{unfinished}: not written; is there room, and the folder?"):
        yield unfinished
    if unfinished.is_dir():  # a file is replaced as it is, and never replaces a folder
        shutil.rmtree(path, ignore_errors=True)
    os.replace(unfinished, path)


def write_rows(path, rows):
    """Writes one JSON line per row, the whole file or nothing."""
    with written_whole(path) as unfinished:
        unfinished.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def saved_row(path):
    """The first row of a file that write_rows wrote, {} if there is none. Raises UserError."""
    return next((row for _, row in read_rows(path)), {}) if path.exists() else {}


# ---- The picture ---------------------------------------------------------------------------------
def plot(runs, out):
    """Draws the curves of all trains in folders; prints their last figures. Raises UserError."""
    from matplotlib.figure import Figure  # here, since nothing else needs it
    axis = Figure(figsize=(8, 4), layout="constrained").subplots()
    for run in runs:
        for path in sorted(run.rglob("summary.json"), reverse=True):
            summary = saved_row(path)
            if "curve" in summary:  # else it is that of a collection, or of a whole run
                name, (steps, shares) = f"{summary['arm']} ({path.parent})", zip(*summary["curve"])
                axis.plot(steps, shares, ".-", label=name)
                print(f"{name}, step {steps[-1]}: mean@k {shares[-1]:.1%}")
    require(axis.lines, f"{runs[0]}: no finished run of train")
    axis.set(xlabel="step", ylabel="held-out accuracy, mean@k")
    axis.legend()
    out.mkdir(parents=True, exist_ok=True)
    axis.figure.savefig(out / "curves.png", dpi=120)
    print(f"the curves: {out / 'curves.png'}")


# ---- The command line ----------------------------------------------------------------------------
MAY_BE_ZERO = {"seed", "bf16", "threads", "train_size", "lr_warmup_steps", "clip_low", "clip_high",
               "dual_clip", "overlong_buffer"}


def parse(argv):
    """The command, the folders to plot, the settings. Raises UserError; bad flags, SystemExit."""
    text = f"{__doc__}\n{inspect.getsource(Config)}"  # the flags' help are the comments there
    parser = argparse.ArgumentParser("rlep.py", argparse.SUPPRESS, text, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = ["run", "train", "collect", "eval", "plot"]
    parser.add_argument("command", nargs="?", default="run", choices=commands)
    parser.add_argument("runs", nargs="*", type=Path, help="for plot: folders of finished runs")
    for flag in fields(Config):
        parser.add_argument(f"--{flag.name}", type=flag.type, default=flag.default,
                            help=argparse.SUPPRESS)
    given = vars(parser.parse_intermixed_args(argv))
    command, runs, config = given.pop("command"), given.pop("runs"), Config(**given)
    for name, value in asdict(config).items():
        zero = name in MAY_BE_ZERO or (command, name) == ("eval", "temperature")  # 0: greedy
        good = isinstance(value, str) or 0 < value < 1e12 or value == 0 and zero
        require(good, f"--{name} {value}: must be above 0{', or 0' * zero}, and below 1e12")
    require(config.dual_clip == 0 or config.dual_clip > 1, "--dual_clip: must be above 1, or 0")
    require(config.overlong_buffer <= config.max_new_tokens, "--overlong_buffer: is too long")
    require(not config.pool or command == "train", "--pool: is for train")
    require(config.model or command in ("run", "train", "plot"), f"{command}: needs a --model")
    require(bool(runs) == (command == "plot"), "only plot takes folders, of finished runs")
    names = [Path(path).name for path in (config.model, config.data, config.pool) if path]
    config.out = config.out or f"runs/{'-'.join([command, *names])}-seed{config.seed}"
    return command, runs, config


def main(argv=None):
    """Runs a command. Returns the exit status: 0, 2 for bad input, 130 after Ctrl-C."""
    transformers.utils.logging.disable_progress_bar()
    try:
        command, runs, config = parse(argv)
        torch.set_num_threads(config.threads or torch.get_num_threads())
        if command == "plot":
            plot(runs, Path(config.out))
        elif command == "collect":
            collect(config, load_problems(config)[0])
        elif command == "eval":
            held_out = load_problems(config)[1]
            evaluate(Policy(config, held_out), held_out, config, config.model)
        else:
            (run if command == "run" else train)(config, *load_problems(config))
        return 0
    except (UserError, OSError, ImportError) as error:
        message, status = "error: " + " ".join(str(error).split()), 2
    except torch.OutOfMemoryError:
        message, status = "error: out of memory; lower --sample_rows and --micro_tokens", 2
    except KeyboardInterrupt:
        message, status = "stopped; the same command goes on from what is saved", 130
    print("rlep.py:", message, file=sys.stderr)
    return status


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="replace")  # what a terminal cannot show must not end a run
    sys.exit(main())
