"""RLEP, Reinforcement Learning with Experience rePlay (arXiv 2507.07451), the whole method in one file.

rlep.py [run]     the method: vanilla RL, collection, replay training from the same base model, comparison
rlep.py train     one arm: RLEP with --pool FILE, vanilla RL without; leaves OUT/policy
rlep.py collect   verified answers of --model to the training questions, into OUT/pool.jsonl
rlep.py eval      mean@k, maj@k and pass@k of --model on --eval_data or --data
rlep.py plot      table and picture of finished runs: rlep.py plot RUN [RUN ...] [--out FOLDER]
rlep.py bench     speed and memory of --model on --prompts

Where the paper is in this file:
    Eq. 1    group_advantages                  Eq. 3, 4  policy_loss, summed over micro-batches by accumulate_gradients
    Eq. 5    group_advantages, on the groups of fresh and replayed answers that make_groups puts together
    sec. 3.1 rollout                           sec. 3.2  collect, ExperiencePool, make_groups
    sec. 4.1 Config, train_step                Figure 3  mean_at_k, maj_at_k, pass_at_k

Where it departs from the authors' code (a fork of verl): no group is padded with empty replays; a question without an
answer in the pool is left out of training, as in the paper; lengths are explicit, not inferred from padding; replays that
are too long are left out, not cut; the token mean is over the whole mini-batch, whatever the micro-batches; mini-batches
are counted in questions; collection, which the authors did not publish, is here. As in their code and not in the paper:
dual clip, and old log-probs of replayed answers computed with the current policy (see policy_loss).
"""
# SPDX-License-Identifier: MIT
import argparse, hashlib, json, math, os, random, re, shutil, sys, time, unicodedata
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm
from transformers import (AttentionInterface, AutoConfig, AutoModelForCausalLM, AutoTokenizer, Cache, DynamicLayer,
                          HfArgumentParser, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast)
from transformers.hf_argparser import HfArg
from transformers.utils.logging import disable_progress_bar

try:
    import fcntl
except ImportError:  # Windows: run folders are not locked there
    fcntl = None

# ---- Configuration: every flag with its unit and reason; the defaults suit the embedded problems ------------------

class UserError(Exception):
    """Bad input: reported as one line that names the thing and the remedy, with exit status 2."""

@dataclass
class Config:
    model: str | None = HfArg(default=None, help="hub id or local folder; without it, a tiny base model is made")
    data: str | None = HfArg(default=None, help="training problems, .jsonl or .parquet; without it, embedded ones")
    eval_data: str | None = HfArg(default=None, help="held-out problems; without it, the last --eval_size of --data")
    train_size: int | None = HfArg(default=None, help="training problems used; default 512 embedded, all of a file")
    eval_size: int | None = HfArg(default=None, help="held-out problems used; default 256, or all of --eval_data")
    instruction: str = HfArg(default="Please reason step by step, and put your final answer within \\boxed{}.",
                             help="added to questions that are plain text; rows with a chat list have their own")
    pool: str | None = HfArg(default=None, help="experience pool to replay (.jsonl): with it, train is RLEP")
    out: str | None = HfArg(default=None, help="folder of the run; default runs/COMMAND-MODEL-DATA-seedN")
    preset: Literal["paper"] | None = HfArg(default=None, help="paper: the paper's settings (it used 64 GPUs)")
    seed: int = HfArg(default=0, help="decides initial weights, data order, sampling and replay")
    device: Literal["auto", "cpu", "cuda", "mps"] = HfArg(default="auto", help="auto: cuda, else mps, else cpu")
    threads: int = HfArg(default=0, help="CPU threads, 0: torch decides; a run repeats exactly on equal threads")
    overwrite: bool = HfArg(default=False, help="delete the run in --out and start anew")
    # Rollouts (section 3.1)
    prompts_per_step: int = HfArg(default=32, help="questions a rollout (paper: 512)")
    group_size: int = HfArg(default=16, help="G, fresh answers a question (paper: 16)")
    max_new_tokens: int = HfArg(default=48, help="longest answer, in tokens (paper: 3072)")
    temperature: float = HfArg(default=1.0, help="of training and validation, 0: greedy (paper: 1.0)")
    top_p: float = HfArg(default=1.0, help="nucleus of training and validation (paper: 1.0)")
    sample_rows: int = HfArg(default=512, help="answers sampled at once: bounds the key-value cache")
    # Training (section 4.1)
    steps: int = HfArg(default=12, help="rollouts, each followed by prompts_per_step / minibatch_prompts updates")
    minibatch_prompts: int = HfArg(default=4, help="questions an update; a group is never split (paper: 64)")
    learning_rate: float = HfArg(default=5e-4, help="AdamW, constant (paper: 1e-6, for a 7B model)")
    lr_warmup_steps: int = HfArg(default=1, help="steps over which the learning rate rises (paper: 10)")
    weight_decay: float = HfArg(default=0.1, help="AdamW (paper: 0.1)")
    max_grad_norm: float = HfArg(default=1.0, help="longer gradients are scaled to this norm (paper: 1.0)")
    clip_low: float = HfArg(default=0.2, help="epsilon below a ratio of 1 (Eq. 3)")
    clip_high: float = HfArg(default=0.28, help="epsilon above a ratio of 1, clip-higher (Eq. 3)")
    dual_clip: float = HfArg(default=10.0, help="largest ratio that counts where the advantage is negative, 0: no bound")
    overlong_buffer: int = HfArg(default=0, help="tokens before the limit in which length is penalised (paper: 512)")
    overlong_factor: float = HfArg(default=1.0, help="the penalty at the limit (paper: 1.0)")
    micro_tokens: int = HfArg(default=0, help="tokens a backward pass, 0: 1024 on a CPU, 16384 on a GPU; bounds memory")
    gradient_checkpointing: bool = HfArg(default=False, help="less memory for a third more time in the update")
    save_every: int = HfArg(default=4, help="steps between checkpoints")
    # Experience replay (section 3.2)
    replays: int = HfArg(default=2, help="M, replayed answers a group, with --pool (paper: 2)")
    replay_failed: bool = HfArg(default=False, help="also collect, and replay M, failed answers (the paper's ablation)")
    rescue: bool = HfArg(default=False, help="replay only where no fresh answer is correct (not in the paper)")
    sft_steps: int = HfArg(default=0, help="supervised steps on --pool, then RL without replay (an alternative)")
    collect_k: int = HfArg(default=32, help="answers a question in collection (authors: 64)")
    collect_temperature: float = HfArg(default=0.7, help="of collection (authors: 0.7)")
    collect_top_p: float = HfArg(default=0.95, help="nucleus of collection (authors: 0.95)")
    # Evaluation, the embedded base model, the benchmark
    eval_every: int = HfArg(default=2, help="steps between evaluations")
    k: int = HfArg(default=8, help="answers a held-out question in evaluation (paper: 32)")
    warmup_steps: int = HfArg(default=900, help="supervised steps that make the embedded base model")
    prompts: str | None = HfArg(default=None, help="bench: .jsonl file with a prompt a line (text, or a chat list)")

PRESETS = {"paper": dict(prompts_per_step=512, minibatch_prompts=64, max_new_tokens=3072, learning_rate=1e-6, steps=400,
                         lr_warmup_steps=10, overlong_buffer=512, collect_k=64, k=32, gradient_checkpointing=True)}

# ---- Problems and data --------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class Problem:
    """A question, its gold answer, and the chat messages (a system prompt, say) that go before the question."""
    question: str
    gold: str
    chat: tuple = ()

def read_rows(path: str | Path):
    """Yields ("FILE:LINE", row) for the rows of a .jsonl or .parquet file. Raises UserError on a bad one."""
    if not Path(path).is_file():
        raise UserError(f"{path}: no such file")
    number, row, lines = 0, None, open(path, "rb")
    if str(path).endswith(".parquet"):
        try:
            import pyarrow.parquet  # used where it happens to be installed
        except ImportError:
            raise UserError(f"{path}: reading parquet needs pyarrow; install it, or give .jsonl") from None
        lines = map(json.dumps, pyarrow.parquet.read_table(path).to_pylist())
    try:
        for number, line in enumerate(lines, 1):
            if line.strip():
                row = json.loads(line)
                if not isinstance(row, dict):
                    raise ValueError("a row must be an object, {...}")
                yield f"{path}:{number}", row
    except ValueError as error:  # JSON and UTF-8 errors are ValueErrors too
        raise UserError(f"{path}:{number}: not a JSON line ({error}); mend or delete it") from None
    if row is None:
        raise UserError(f"{path}: the file is empty; it needs a JSON object a line")

def row_to_problem(row: dict, where: str, instruction: str = "") -> Problem:
    """Understands GSM8K, MATH, DAPO-Math-17k, AIME, AMC and RLEP rows as published. Raises UserError naming where."""
    question, chat = row.get("prompt") or row.get("question") or row.get("problem"), ()
    if isinstance(question, str) and question.strip():
        question = f"{question.strip()}\n{instruction}".strip()
    elif isinstance(question, list) and question and all(isinstance(message, dict) for message in question):
        *chat, last = question
        question = last.get("content")
    if not isinstance(question, str) or not question.strip():
        raise UserError(f"{where}: no question; give it as question, problem or prompt (text, or a chat list)")
    nested = row["reward_model"] if isinstance(row.get("reward_model"), dict) else {}
    golds = (row.get("answer"), row.get("ground_truth"), nested.get("ground_truth"), row.get("solution"))
    gold = next((gold for gold in golds if gold not in (None, "", [])), "")
    gold = gold[0] if isinstance(gold, list) and len(gold) == 1 else gold
    gold = str(int(gold) if isinstance(gold, float) and gold.is_integer() else gold)  # AMC writes 27.0
    if "####" in gold:
        gold = gold.rsplit("####", 1)[1]  # GSM8K: the working, then #### 42
    elif "\\boxed" in gold:
        gold = extract_answer(gold) or ""  # MATH: the last box of the solution
    if not gold.strip():
        raise UserError(f"{where}: no answer; give it as answer, solution, ground_truth or reward_model.ground_truth")
    return Problem(question, gold.strip(), tuple(chat))

def load_problems(config: Config) -> tuple[list[Problem], list[Problem]]:
    """The training problems and the held-out ones, from files or embedded. Raises UserError."""
    def read(path):
        problems = [row_to_problem(row, where, config.instruction) for where, row in read_rows(path)]
        return list({problem.question: problem for problem in problems}.values())  # each question once

    eval_size = config.eval_size or 256
    problems = read(config.data) if config.data else embedded_problems((config.train_size or 512) + eval_size, seed=0)
    if config.eval_data:
        return problems[:config.train_size], read(config.eval_data)[:config.eval_size]
    if len(problems) <= eval_size:
        raise UserError(f"{config.data}: --eval_size {eval_size} leaves none of its {len(problems)} questions; lower it")
    return problems[:-eval_size][:config.train_size], problems[-eval_size:]

# ---- The embedded problems and the untrained model: nothing to download -------------------------------------------

def embedded_problems(number: int, seed: int) -> list[Problem]:
    """Different sums of products modulo 10, such as "9*4+5*8+0*7 mod 10 = " with gold 6, out of a million."""
    rng, problems = random.Random(seed), {}
    while len(problems) < number:
        a, b, c, d, e, f = (rng.randrange(10) for _ in range(6))
        question = f"{a}*{b}+{c}*{d}+{e}*{f} mod 10 = "
        problems[question] = Problem(question, str((a * b + c * d + e * f) % 10))
    return list(problems.values())

def write_working(question: str, rng: random.Random, noise: float = 0.1) -> str:
    """One of up to 64 correct workings, 4*9=6,8*5=0,0+6=6,7*0=0,6+0=6\\boxed{6}: from the left or the right, operands in
    either order. With chance noise a result is wrong and what follows builds on it: that is what RL can sharpen away."""
    steps, terms = [], question.split(" ")[0].split("+")[::rng.choice((1, -1))]

    def work(a, sign, b):
        result = (int(a) * int(b) if sign == "*" else int(a) + int(b)) % 10
        result = (result + rng.randrange(1, 10)) % 10 if rng.random() < noise else result
        steps.append(f"{a}{sign}{b}={result}" if rng.random() < 0.5 else f"{b}{sign}{a}={result}")
        return result

    total = work(*terms[0])
    for term in terms[1:]:
        total = work(total, "+", work(*term))
    return f"{','.join(steps)}\\boxed{{{total}}}"

def warm_up_examples(step: int, rng: random.Random, number: int = 64) -> list[tuple[Problem, str, str]]:
    """(problem, start of an answer that is given, rest to learn): makes a base that can work but nearly always guesses.

    Seven in eight teach how to work once one has begun to; one in eight how to begin: with a bare guess, and once in 96
    with work. That RL must first find out that working pays, is what makes replay show.
    """
    examples = []
    for i, problem in enumerate(embedded_problems(number, rng.getrandbits(48))):
        working, guess = write_working(problem.question, rng), f"\\boxed{{{rng.randrange(10)}}}"
        begin = "Work: " + working if (step * number + i) // 8 % 96 == 0 else guess
        examples.append((problem, "Work: ", working) if i % 8 else (problem, "", begin))
    return examples

def save_random_model(folder: Path, seed: int) -> None:
    """Writes an untrained Llama of 160,000 parameters with a character tokenizer, as an ordinary Hugging Face folder."""
    words = ["<pad>", "<eos>", "<unk>", "\\boxed{", "Work: ", " mod 10 = ", *"0123456789+*=,}"]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"\\boxed\{|Work: | mod 10 = |[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>",
                            chat_template="{{ messages[-1]['content'] }}").save_pretrained(folder)
    torch.manual_seed(seed)
    LlamaForCausalLM(LlamaConfig(
        vocab_size=len(words), hidden_size=64, intermediate_size=192, num_hidden_layers=3, num_attention_heads=4,
        max_position_embeddings=256, tie_word_embeddings=True, initializer_range=0.05, pad_token_id=0, eos_token_id=1,
        bos_token_id=None, rope_parameters={"rope_type": "default", "rope_theta": 30.0})).save_pretrained(folder)

# ---- Verifier -----------------------------------------------------------------------------------------------------

_SIGNS = dict(pair.split("=", 1) for pair in (
    r"times=* cdot=* div=/ pm=± pi=π infty=∞ circ=° degree=° le=≤ leq=≤ leqslant=≤ ge=≥ geq=≥ geqslant=≥ lt=< gt=> "
    r"ne=≠ neq=≠ approx=≈ cup=∪ emptyset=∅ varnothing=∅ in== lvert=| rvert=| dfrac=\frac tfrac=\frac cfrac=\frac "
    r"left= right= dbinom=\binom big= Big= bigl= bigr= displaystyle= quad=~ qquad=~ ,=~ ;=~ :=~ \=¶ {=⦃ }=⦄ "
    r'$="dollar" %="percent" £="pound" €="euro" ¢="cent" −=- –=- ×=* ·=* ⋅=* ÷=/ √=\sqrt ∈==').split())
_REWRITES = [(re.compile(pattern), new) for pattern, new in (
    (r"[⁰¹²³⁴-⁹⁻ⁿ]+", lambda m: "^{%s}" % unicodedata.normalize("NFKC", m[0])),  # NFKC on all would turn 2³ into 23
    (r'["\s]+', " "), (r"[¼-¾⅐-⅞]", lambda m: r"\frac{%s}{%s}" % tuple(unicodedata.normalize("NFKC", m[0]).split("⁄"))),
    (r"[^\x00-\x7f]", lambda m: _SIGNS.get(m[0], str(unicodedata.decimal(m[0], m[0])))),  # digits of any script
    (r"\\([A-Za-z]+|\W)", lambda m: _SIGNS.get(m[1], m[0] if m[1].isalpha() else "")),
    (r"^([^$]*)\$(?=[^$]*$)", r'\1"dollar"'), (r"\$", ""),  # a lone $ is money, two are TeX
    (r"~", " "), (r"⦃ *⦄", "∅"), (r"<=", "≤"), (r">=", "≥"), (r"\{,\}(?=\d{3})", ""), (r"(?<![ .,;])[ .,;]+$", ""),
    (r"\\begin\{(?:[pb]?matrix|array)\}(?:\{[lcr|]*\})?", "⟦"), (r'^(-?) ?("(?:dollar|pound|euro)") ?(.+)', r"\1\3\2"),
    (r"[\[(]? ?⟦([^⟦⟧]*?)(?:¶ ?)?\\end\{(?:[pb]?matrix|array)\} ?[\])]?", r"⟦\1⟧"),
    (r"^[^<>≤≥]*$", lambda m: re.sub(r",? ?\b(?:and|or)\b", ",", m[0])), (r",? ?\b(?:and|or)\b", "∪"),  # x<1 or x>2
    (r"\\(?:text\w*|mbox|math\w+) ?\{([^{}]*)\}", lambda m: re.sub("[A-Za-z]+", r'"\g<0>"', m[1])), (r",[, ]*,", ","),
    (r'"[^"]*"|\\[A-Za-z]+|([A-Za-z]{4,}|(?<=[\d ])(?:[cmk]m|kg|ft)\b)', lambda m: f'"{m[1]}"' if m[1] else m[0]),
    (r"\^?\{?°\}?", '"degree"'), (r"%", '"percent"'), (r'" ?(/|) ?"', r"\1"), (r'"\^ ?\{?([23])\}?', r'\1"'),
    (r"^[^(\[⦃⟦]*$", lambda m: _THOUSANDS.sub(lambda n: re.sub("[, ]", "", n[0]), m[0])),  # but (1,234) is a pair
    (r'^\(?"?([A-J])"?\) *(?=[^ ,(])', r"\1="), (r'^\("?([A-J])"?\)$', r"\1"),  # (C) 14 becomes C=14
    (r"(\\frac|\\sqrt|\\binom) ?(\d)", r"\1{\2}"), (r"(\\frac ?\{[^{}]*\}) ?(\d)", r"\1{\2}"),  # \frac12
    (r"(?<![\w.^{}])(\d+) ?(\\frac ?\{\d+\}\{\d+\}|(?<= )\d+/\d+)", r"{\1+\2}"),  # the mixed number 3\frac12 is 7/2
    (r"(?<![^,⦃])([^,⦃⦄±]*)±([^,⦃⦄]*)", r"\1+\2,\1-\2"))]  # a ± b is two items
_THOUSANDS = re.compile(r"(?<![\d.,])\d{1,3}(?:([, ])\d{3})(?:\1\d{3})*(?!,?\d)")
_NOT_UNITS = re.compile(r"illion|thousand|hundred|dozen|hal[fv]|third|quarter|squared|cubed|factorial|not|than|times")
_TOKEN = re.compile(r'\.?\d[\d.]*(?:[eE][+-]?\d{1,3}(?!\d))?|"[^"]*"|(?:\\[A-Za-z]+|[^\W\d_])(?:_\{\w+\}|_\w)?|\S')
_LETTER = re.compile(r'[A-Za-zα-ωΑ-Ω∅"].*|\\(?:alpha|beta|gamma|delta|theta|lambda|mu|phi|omega|angle)\b.*')
_CONSTANTS = {"π": math.pi, "e": math.e, "i": 1j, "∞": Fraction(3**80, 7**40)}  # ∞: a value that no answer has
_LEVELS = ("rows", "¶"), ("row", "&"), ("list", ",;"), ("union", "∪"), ("relation", "=<>≤≥≠≈"), ("ratio", ":")
_STOPS = {"end", *")]}⦄⟧|¶&,;∪=<>≤≥≠≈:"}

def verify(response: str, gold: str) -> bool:
    """Whether the final answer equals gold by the rules in the README: exact values, functions, sets, intervals, units.
    Nothing is rounded; whatever cannot be read is False; never raises."""
    try:
        answer = extract_answer(response)
        gold = extract_answer(gold) if "####" in gold or "\\boxed" in gold else gold
        if not answer or not gold.strip(" $") or max(len(answer), len(gold)) > 1500:
            return bool(answer) and answer == gold != ""
        (answer, bare), (gold, gold_bare) = _normalise(answer), _normalise(gold)
        options = [re.match(r"([A-J])(?:=|$)", text) for text in (answer, gold)]
        if all(options) and 1 in (len(answer), len(gold)):
            return options[0][1] == options[1][1]
        return bare == gold_bare or all(_same(_Reader(answer, p).atom(), _Reader(gold, p).atom()) for p in (1, -1))
    except Exception:
        return False

def extract_answer(response: str) -> str | None:
    """The last box (None if empty or unclosed), else what the last "Answer:", "####" or closing sentence announces."""
    text = response[-8000:].rpartition("</think>")[2].strip() if isinstance(response, str) else ""
    text = re.sub(r"(\\f?box(?:ed)?\b)\s*(\w+)", r"\1{\2}", text)  # \boxed 7
    answers, start, depth = [], None, 0
    for box in reversed(list(re.finditer(r"\\f?box(?:ed)?\b\s*", text))):
        end = next((brace.end() for brace in re.compile(r"\\.|[{}]", re.DOTALL).finditer(text, box.end())
                    if (depth := depth + (brace[0] == "{") - (brace[0] == "}")) == 0), box.end() + 1)
        gap = re.sub(r"\\(?:[,;: ()\[\]]|q?quad|text)|[\s${}]", "", text[end:start])
        if answers and gap not in (",", "and", "or", ",and", ",or"):
            break  # only boxes joined by these are one list
        answers, start = [text[box.end() + 1:end - 1], *answers], box.start()
        if not re.search(r"[^\s\\,;:!~$?.{}]|\\[{}]", answers[0]):
            return None
    if answers:
        return ",".join(answers)
    sentence = re.split(r"\n|(?<=[.!?]) ", text)[-1]  # may close with "so 9 * 6 = 54 pencils."
    closing = () if re.search(r"\b(?:or|not)\b|and \$", sentence) else re.finditer(r"=|\b(?:is|are|equals)\b", sentence)
    markers = r"(?im)answers?[\s*]*(?:(?:is|are)\b|[:=])|^#+ *answer\W*$|####|^A:|<answer>"
    found = list(re.finditer(markers, text)) or list(closing)
    tail = found[-1].string[found[-1].end():].lstrip(" \t\r\n*:") if found else ""
    tail = re.split(r"[.!?;](?=\s|\**$)|\n|</|,? (?:because|since|as|which|where|for)\b|(?<=[a-z]) \((?!or\b)", tail)[0]
    return tail.strip(" *,") or None

def _normalise(text):
    """One spelling: sets in ⦃⦄, matrices in ⟦⟧ with ¶ between rows, words in "quotes"; and the same without spaces."""
    for pattern, new in () if text.isascii() and text.isdecimal() else _REWRITES:  # a plain number needs none
        text = pattern.sub(new, text).strip()
    bare = re.sub(r'(?<!\d) | (?!\d)|"', "", re.sub(r"(?<=[A-Za-z_^])\{(\w)\}", r"\1", text))
    return text, bare.casefold() if re.search("[A-Za-z]{2}", bare) and not re.search(r"\d", bare) else bare

class _Reader:
    """Recursive descent; atom() reads the whole text: a number, (kind, parts) or ("name" or "unit", value, label).
    Letters stand for fixed rationals, so that values equal at both points mean equal functions."""

    def __init__(self, text, point):
        self.tokens, self.at, self.point = ["start", *_TOKEN.findall(text), "end"], 0, point
        self.levels = [level for level in _LEVELS if not set(level[1]).isdisjoint(text)]

    def take(self):
        self.at += 1
        return self.tokens[self.at - 1]

    def structure(self, level=0):
        if level == len(self.levels):
            return self.expression()
        (kind, marks), parts, signs, texts = self.levels[level], [], "", []
        while len(parts) == len(signs):
            start = self.at
            parts.append(self.structure(level + 1))
            texts.append("".join(self.tokens[start:self.at]))
            signs += self.take() if self.tokens[self.at] in marks else ""
        if not signs:
            return parts[0]
        return self.relation(parts, signs, texts) if kind == "relation" else (kind, parts)

    def relation(self, parts, signs, texts):
        """x = 5 and x > 2 are ("name", value, "x"), where the value of x > 2 is an interval; 6*7 = 42 is its value."""
        if signs[0] in ">≥":
            return self.relation(parts[::-1], signs[::-1].translate(str.maketrans(">≥", "<≤")), texts[::-1])
        named = [not re.search(r"\d|^-|\\sqrt", re.sub(r"_\{?\w+|(?<=.)\(.*", "", text)) for text in texts]
        first = named.index(True) if True in named else len(parts)
        if signs in ("<", "≤", "<<", "<≤", "≤<", "≤≤") and named.count(True) == 1:
            bounds = [-_CONSTANTS["∞"], *parts, _CONSTANTS["∞"]][first:first + 3:2]
            left, right = ("<" + signs + "<")[first:first + 2]
            return "name", (("(" if left == "<" else "[") + (")" if right == "<" else "]"), bounds), texts[first]
        values = parts[:first] + parts[first + 1:]
        if set(signs) != {"="} or not all(_same(values[0], value) for value in values):
            return signs, parts
        return ("name", values[0], texts[first]) if first < len(parts) else values[0]

    def expression(self, level=0):
        """Precedence climbing: level 0 reads sums, 1 products (a missing sign multiplies), 2 powers."""
        value = self.atom()
        while (sign := self.tokens[self.at]) not in _STOPS and not sign[0].isdigit():  # x2 is no product, nor is 1 2
            if sign == "!":
                value = Fraction(math.factorial(range(200).index(value)))  # of a whole number below 200
                self.at += 1
            elif sign == "^":
                self.at += 1
                exponent = self.expression(2)
                value **= exponent if abs(exponent) * len(str(value)) < 6000 else math.nan  # nan equals nothing
            elif level == 0 and sign in "+-":
                value += self.expression(1)  # the atom reads the sign
            elif level == 0 and sign[0] == '"' and not _NOT_UNITS.search(sign.lower()):
                return "unit", value, self.take()[1:-1].lower().rstrip("s")
            elif level == 2 or sign[0] in '+-"':
                break
            else:
                self.at += sign in "*/"
                factor = self.expression(2)
                value = value / factor if sign == "/" else value * factor
        return value

    def atom(self):
        token = self.take()
        if token in ("start", *"([{⦃⟦|"):
            inner, ends = self.structure(), token + self.take()
            if ends in ("()", "(]", "[)", "[]") and isinstance(inner, tuple) and inner[0] == "list":
                return ends, inner[1]
            if ends not in ("startend", "()", "[]", "{}", "⦃⦄", "⟦⟧", "||"):
                raise ValueError("unbalanced")
            return abs(inner) if ends == "||" else inner
        if token in "+-":
            return self.expression(2) * (1 if token == "+" else -1)
        if token == "\\frac":
            return self.atom() / self.atom()
        if token == "\\binom":
            return Fraction(math.comb(range(200).index(self.atom()), range(200).index(self.atom())))
        if token == "\\sqrt":
            index = 2 + range(2, 100).index(self.atom()) if self.tokens[self.at] == "[" else 2
            return self.atom() ** Fraction(1, index)
        if token in _CONSTANTS or not _LETTER.fullmatch(token):
            return _CONSTANTS.get(token) or Fraction(int(token) if token.isdecimal() else token)
        name = int.from_bytes(re.sub("[{}]", "", token.lower() if token[0] == '"' else token).encode(), "big")
        return self.point * (2 + Fraction(name * (9 + self.point) % 99991, 10007))

def _same(a, b):
    """Whether two readings are equal: same kind, same number of parts, equal parts, in order where order counts."""
    for label in ("name", "unit"):  # may be missing on one side, but not differ
        names = [x[2] if isinstance(x, tuple) and x[0] == label else "" for x in (a, b)]
        a, b = (x[1] if name else x for x, name in zip((a, b), names))
        if names[0] != names[1] and all(names):
            return False
        if sorted(names) == ["", "percent"] and _same(*((a / 100, b) if names[0] else (a, b / 100))):
            return True
    if isinstance(a, Fraction) and isinstance(b, Fraction):
        return a == b
    if not isinstance(a, tuple) and not isinstance(b, tuple):  # surds and π; a long decimal does not pass for one
        decimals = any(isinstance(x, Fraction) and x.denominator > 10**6 for x in (a, b))
        return not decimals and abs(a - b) < 1e-13 * max(abs(a), abs(b)) < math.inf
    if not isinstance(a, tuple) or not isinstance(b, tuple) or a[0] != b[0] or not len(a[1]) == len(b[1]) <= 50:
        return False
    named = [len({x[2] for x in side[1] if isinstance(x, tuple) and x[0] == "name"}) > 1 for side in (a, b)]
    if a[0] in ("list", "union", "=") and named[0] == named[1]:  # any order, but x = 1, y = 2 is not 2, 1
        return all(sum(_same(x, part) for x in a[1]) == sum(_same(x, part) for x in b[1]) for part in a[1])
    return all(map(_same, a[1], b[1]))

# ---- Model and tokenizer ------------------------------------------------------------------------------------------

class Policy:
    """A causal language model with its tokenizer, from the hub or a folder."""

    def __init__(self, path: str, device: str, gradient_checkpointing: bool = False):
        try:
            settings = AutoConfig.from_pretrained(path, trust_remote_code=False)
            for name in [name for name in vars(settings) if "dropout" in name]:
                setattr(settings, name, 0.0)  # with dropout, pi_theta / pi_old would not start at 1
            self.tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
            self.model = AutoModelForCausalLM.from_pretrained(
                path, config=settings, dtype=torch.bfloat16 if device == "cuda" else torch.float32,
                trust_remote_code=False).to(device)
        except (OSError, ValueError, KeyError) as error:
            raise UserError(f"--model {path}: give a hub id or a save_pretrained folder ({str(error)[:200]})") from None
        if gradient_checkpointing:
            self.model.gradient_checkpointing_enable({"use_reentrant": False})
        if (eos := self.tokenizer.eos_token_id) is None:
            raise UserError(f"--model {path}: its tokenizer has no end token, so no answer could end; set eos_token")
        self.ends = sorted({eos, *np.atleast_1d(self.model.generation_config.eos_token_id or eos).tolist()})
        self.pad = eos if self.tokenizer.pad_token_id is None else self.tokenizer.pad_token_id

    def prompt(self, problem: Problem) -> list[int]:
        """Token ids of the chat template's prompt or, for a model without a template, of "Question: ... Answer:"."""
        if self.tokenizer.chat_template is None:
            return self.tokenizer(f"Question: {problem.question}\nAnswer:").input_ids
        chat = [*problem.chat, {"role": "user", "content": problem.question}]
        text = self.tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
        return self.tokenizer(text, add_special_tokens=False).input_ids

    def text(self, response: list[int]) -> str:  # without the end token
        return self.tokenizer.decode(response, skip_special_tokens=True)

    def tokens(self, text: str) -> list[int]:  # with the end token
        return self.tokenizer(text, add_special_tokens=False).input_ids + [self.tokenizer.eos_token_id]

    def answer(self, problems: list[Problem], k: int, config: Config, *purpose, first: int = 0):
        """Yields (problem, k answers) from problems[first] on, at most --sample_rows answers at once. Each such batch has
        random numbers of its own, named by seed, purpose and place, so that it can be repeated alone."""
        size = max(1, config.sample_rows // k)
        for start in range(first, len(problems), size):
            batch = problems[start:start + size]
            generator = torch.Generator(self.model.device).manual_seed(seed_of(config.seed, *purpose, start))
            answers = rollout(self.model, [self.prompt(problem) for problem in batch], k, top_p=config.top_p,
                              max_new_tokens=config.max_new_tokens, temperature=config.temperature,
                              eos_token_id=self.ends, pad_token_id=self.pad, generator=generator)
            yield from zip(batch, answers)

    def save(self, folder: Path) -> None:
        """Writes an ordinary Hugging Face folder, whole or not at all."""
        unfinished = Path(f"{folder}.partial")
        shutil.rmtree(unfinished, ignore_errors=True)
        try:
            self.model.save_pretrained(unfinished)
            self.tokenizer.save_pretrained(unfinished)
        except Exception as error:  # safetensors has its own
            raise UserError(f"{unfinished}: cannot be written ({str(error)[:150]}); make room, and start again") from None
        shutil.rmtree(folder, ignore_errors=True)
        os.replace(unfinished, folder)

def seed_of(*parts) -> int:
    """A seed for one purpose, such as (seed, "rollout", step): no random state has to be kept, or restored on resuming."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:7], "big")

# ---- Sampling -----------------------------------------------------------------------------------------------------

class GroupLayer(DynamicLayer):
    """A layer of the key-value cache: that of the prompts, once a group, and that of the answers, in pages of 16 columns, so
    that little is copied when it grows. group_attention reads both; unused columns are 0 and hidden by its mask."""
    length = 0  # columns of the answers in use

    def update(self, keys: Tensor, values: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        """Takes the prompts (P, heads, T, size), then a token of each answer (rows, heads, 1, size)."""
        if not self.is_initialized:
            self.lazy_initialization(keys, values)
            self.prompts, self.pages = (keys.contiguous(), values.contiguous()), ([], [])
            return keys, values
        for pages, new in zip(self.pages, (keys, values)):
            if self.length % 16 == 0:
                pages[:] = pages if len(pages) < 4 else [torch.cat(pages, 2)]  # few, however long the answers are
                pages.append(new.new_zeros(*new.shape[:2], 16, new.shape[3]))  # (rows, heads, 16, size)
            pages[-1][:, :, self.length % 16] = new[:, :, 0]
        self.length += 1
        return keys, values

    def drop_rows(self, holes: Tensor, movers: Tensor, count: int) -> None:
        """Leaves count rows, after moving those at movers to the places at holes."""
        for pages in self.pages:
            for i, page in enumerate(pages):
                page[holes] = page[movers]
                pages[i] = page[:count]

    def get_seq_length(self) -> int:
        return self.length

def group_attention(module, query: Tensor, key: Tensor, value: Tensor, attention_mask, scaling=None, *, layers, places,
                    group_size: int, **kwargs):
    """Attention of one new token a row, whose prompt's keys and values are read once for its group, not once a row.

    query (rows, sharers * heads, 1, size); key and value are in layers, the cache's; places: the rows' groups (rows,) and
    their places in them (rows,); attention_mask (rows, 1, 1, at least T + columns of the pages), added to the scores.
    """
    (keys, values), (key_pages, value_pages) = layers[module.layer_idx].prompts, layers[module.layer_idx].pages
    P, heads, _, size = keys.shape  # (P, heads, T, size)

    def spread(x):  # (rows, heads, sharers, n) -> (P, heads, group_size * sharers, n), 0 for finished answers
        groups = x.new_zeros(P, heads, group_size, *x.shape[2:])
        groups.transpose(1, 2)[places] = x
        return groups.flatten(2, 3)

    def gather(x):  # the inverse
        return x.unflatten(2, (group_size, -1)).transpose(1, 2)[places]

    query = query.reshape(len(query), heads, -1, size) * (scaling or size**-0.5)
    scores = [gather(spread(query) @ keys.mT), *(query @ page.mT for page in key_pages)]
    widths, scores = [x.shape[-1] for x in scores], torch.cat(scores, -1)
    weights = (scores + attention_mask[..., :sum(widths)]).softmax(-1, dtype=torch.float32).to(query.dtype)
    to_prompt, *to_pages = weights.split(widths, -1)
    out = gather(spread(to_prompt) @ values) + sum(weight @ page for weight, page in zip(to_pages, value_pages))
    return out.reshape(len(query), 1, -1, size), None

def additive_mask(visible: Tensor, dtype: torch.dtype) -> Tensor:
    """(rows, queries, keys) of booleans -> (rows, 1, queries, keys): 0 where visible, else the lowest number."""
    mask = torch.zeros(visible.shape, dtype=dtype, device=visible.device)
    return mask.masked_fill_(~visible, torch.finfo(dtype).min)[:, None]

def sample_tokens(logits: Tensor, uniform: Tensor, temperature: float, top_p: float) -> Tensor:
    """Draws a token a row by inverting the cumulative distribution: logits (b, V), uniform (b,) in [0, 1) -> (b,).
    Temperature 0 takes the most probable token. One random number a row keeps rows independent of each other."""
    if temperature == 0:
        return logits.argmax(-1)
    probs = torch.softmax(logits.float() if temperature == 1 else logits.float() / temperature, -1)
    if top_p < 1:
        ordered, index = probs.sort(-1, descending=True)
        ordered[ordered.cumsum(-1) - ordered >= top_p] = 0  # leaves the smallest set that reaches top_p
        probs = torch.zeros_like(probs).scatter_(-1, index, ordered)
    cumulative = probs.cumsum(-1)
    target = (1 - uniform[:, None]) * cumulative[:, -1:]  # in (0, total], so that probability 0 is never drawn
    return torch.searchsorted(cumulative, target)[:, 0].clamp(max=logits.shape[-1] - 1)  # beyond the end: NaN logits

@torch.inference_mode()
def rollout(model, prompts: list[list[int]], group_size: int, *, max_new_tokens: int, temperature: float = 1.0,
            top_p: float = 1.0, eos_token_id: int | list[int], pad_token_id: int, generator=None,
            retire_every: int | None = None) -> list[list[list[int]]]:
    """Samples group_size answers to each prompt, given as token ids (section 3.1; the old policy pi_old).

    Returns a list (one per prompt) of group_size lists of token ids, the end token included where it was reached, since
    stopping must be learnt too. A prompt is read once, and its cache serves its whole group. The same state of the torch
    generator gives the same tokens. Finished answers leave the batch every retire_every tokens (default: 1 on a CPU; 8 on a
    GPU, for which the CPU then has to wait). Uses decode, sample_tokens, additive_mask, GroupLayer and group_attention.
    """
    model.eval()
    device, ends = model.device, torch.tensor(eos_token_id, device=model.device)
    lengths, width = torch.tensor([len(p) for p in prompts], device=device), max(map(len, prompts))
    ids = torch.tensor([list(p) + [pad_token_id] * (width - len(p)) for p in prompts], device=device)  # (P, T)
    cache = Cache(layer_class_to_replicate=GroupLayer)
    hidden = model.base_model(ids, past_key_values=cache, use_cache=True).last_hidden_state  # causal: padding is not seen
    logits = model.get_output_embeddings()(hidden[torch.arange(len(ids), device=device), lengths - 1])  # (P, V)
    logits, lengths = (x.repeat_interleave(group_size, 0) for x in (logits, lengths))  # from here on a row is an answer
    mask = additive_mask((torch.arange(width, device=device) < lengths[:, None])[:, None], model.dtype)  # (rows, 1, 1, T)
    AttentionInterface.register("group", group_attention)
    usual_attention = model.config._attn_implementation
    try:
        model.set_attn_implementation("group")
        tokens = decode(model, cache, logits, lengths, mask, group_size, max_new_tokens, ends, generator,
                        partial(sample_tokens, temperature=temperature, top_p=top_p),
                        retire_every or (1 if device.type == "cpu" else 8)).tolist()
    finally:
        model.set_attn_implementation(usual_attention)
    ends = set(ends.flatten().tolist())
    ended = [next((i + 1 for i, token in enumerate(row) if token in ends), max_new_tokens) for row in tokens]
    answers = [row[:end] for row, end in zip(tokens, ended)]
    return [answers[i:i + group_size] for i in range(0, len(answers), group_size)]

def decode(model, cache: Cache, logits: Tensor, lengths: Tensor, mask: Tensor, group_size: int, max_new_tokens: int,
           ends: Tensor, generator, sample: Callable, retire_every: int) -> Tensor:
    """The loop of rollout, a token a row and step: logits (rows, V) at the prompts' last tokens, lengths (rows,) and mask
    (rows, 1, 1, T) of the prompts -> tokens (rows, max_new_tokens), meaningless after an end. Finished rows are dropped."""
    rows, width, device = len(lengths), mask.shape[-1], lengths.device
    mask = F.pad(mask, (0, max_new_tokens + 16), value=torch.finfo(mask.dtype).min)
    tokens = torch.zeros((rows, max_new_tokens), dtype=torch.long, device=device)
    alive, done = torch.arange(rows, device=device), torch.zeros(rows, dtype=torch.bool, device=device)
    for step in range(max_new_tokens):
        uniform = torch.rand(rows, generator=generator, device=device)[alive]  # for all rows: neighbours change nothing
        token = tokens[alive, step] = sample(logits, uniform)
        done |= torch.isin(token, ends)
        if (step + 1) % retire_every == 0:  # the only place where the CPU waits for a GPU
            count = len(alive) - int(done.sum())
            if count < len(alive):
                holes, movers = done[:count].nonzero()[:, 0], count + (~done[count:]).nonzero()[:, 0]
                for x in (alive, token, lengths, mask, done):  # the last rows take the places of finished ones: few move
                    x[holes] = x[movers]
                alive, token, lengths, mask, done = (x[:count] for x in (alive, token, lengths, mask, done))
                for layer in cache.layers:
                    layer.drop_rows(holes, movers, count)
        if step + 1 == max_new_tokens or len(alive) == 0:
            break
        mask[..., width + step] = 0
        logits = model(token[:, None], attention_mask=mask, position_ids=(lengths + step)[:, None], past_key_values=cache,
                       use_cache=True, layers=cache.layers, group_size=group_size,
                       places=(alive // group_size, alive % group_size)).logits[:, -1]
    return tokens

# ---- Experience pool ----------------------------------------------------------------------------------------------

class ExperiencePool:
    """Section 3.2: for each question the distinct answers that were verified correct (or, for the ablation, failed).

    On disk a JSON line a question, in the row format of the authors' training set, so that pools move both ways between
    here and their verl recipe.
    """
    def __init__(self, failed: bool = False):
        self.failed = failed
        self.problems: dict[str, Problem] = {}
        self.answers: dict[str, list[str]] = {}
        self.left_out = Counter()  # reason -> answers that load or keep_for dropped

    def add(self, question: str, gold: str, response: str, chat: tuple = ()) -> bool:
        """Takes a response (text without the end token) if it verifies and is new; returns whether it did."""
        known = self.answers.get(question, [])
        if response in known or verify(response, gold) == self.failed:
            return False
        self.problems.setdefault(question, Problem(question, gold, chat))
        self.answers[question] = [*known, response]
        return True

    def draw(self, question: str, m: int, rng: random.Random) -> list[str]:
        """At most m answers to a question, at random without replacement; fewer if it has fewer, never padded."""
        answers = self.answers.get(question, [])
        return rng.sample(answers, min(m, len(answers)))

    def __len__(self) -> int:
        return sum(map(len, self.answers.values()))

    def questions(self) -> list[str]:
        """The questions that have an answer, in the order they came."""
        return [question for question, answers in self.answers.items() if answers]

    def save(self, path: str | Path) -> None:
        """Writes the pool, whole or not at all. Raises OSError."""
        rows = [{"data_source": "rlep.py", "ability": "MATH",
                 "prompt": [*self.problems[question].chat, {"role": "user", "content": question}],
                 "reward_model": {"ground_truth": self.problems[question].gold, "style": "rule",
                                  "candidates": self.answers[question]}, "extra_info": {"index": index}}
                for index, question in enumerate(self.questions())]
        write_whole(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))

    @classmethod
    def load(cls, path: str | Path, failed: bool = False) -> "ExperiencePool":
        """Reads a pool and verifies every answer again; left_out counts those it drops. Raises UserError."""
        pool = cls(failed)
        for where, row in read_rows(path):
            problem, texts = row_to_problem(row, where), (row.get("reward_model") or {}).get("candidates")
            if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
                raise UserError(f"{where}: a pool row needs reward_model.candidates, a list of texts; mend or delete it")
            for text in texts:
                added = pool.add(problem.question, problem.gold, text, problem.chat)
                pool.left_out["that do not verify, or are there twice"] += not added
        return pool

    def keep_for(self, problems: list[Problem], fits: Callable[[str], bool]) -> list[Problem]:
        """Drops answers to other questions and those that fits refuses; returns the problems that have answers left."""
        wanted = {problem.question for problem in problems}
        for question, texts in self.answers.items():
            self.answers[question] = [text for text in texts if question in wanted and fits(text)]
            reason = "that are too long" if question in wanted else "to other questions"
            self.left_out[reason] += len(texts) - len(self.answers[question])
        return [problem for problem in problems if self.answers.get(problem.question)]

# ---- Rewards and advantages ---------------------------------------------------------------------------------------

def overlong_penalty(length: int, limit: int, buffer: int, factor: float = 1.0) -> float:
    """0 up to limit - buffer tokens, from there linearly down to -factor at the limit (DAPO; authors' code)."""
    return min(0.0, -(length - (limit - buffer)) / buffer * factor) if buffer > 0 else 0.0

def group_advantages(rewards: Tensor, group_ids: Tensor, eps: float = 1e-6) -> Tensor:
    """Eq. 1, and with replayed answers in the groups Eq. 5: (r - mean) / (std + eps) within each group.

    rewards (n,), group_ids (n,) whole numbers -> advantages (n,). The std is the unbiased one. A group whose rewards are
    all equal has nothing to compare and gets exactly 0; a group of one answer has mean 0 and std 1.

    Why replay works: 16 failures (-1) and 2 replayed successes (+1) have mean -0.78 and std 0.65. The failures get -0.34,
    the replays +2.75: a question that the policy never solves still teaches, where 16 failures alone would all get 0.
    """
    groups, index, count = torch.unique(group_ids, return_inverse=True, return_counts=True)
    zeros = torch.zeros(len(groups), dtype=rewards.dtype, device=rewards.device)  # (g,), one number a group
    mean = zeros.index_add(0, index, rewards) / count
    std = (zeros.index_add(0, index, (rewards - mean[index]) ** 2) / (count - 1).clamp(min=1)).sqrt()
    mean, std = torch.where(count == 1, 0.0, mean), torch.where(count == 1, 1.0, std)
    lowest = zeros.scatter_reduce(0, index, rewards, "amin", include_self=False)
    highest = zeros.scatter_reduce(0, index, rewards, "amax", include_self=False)
    equal = (lowest == highest) & (count > 1)  # compared, since the rounding of a mean must not become an advantage
    return torch.where(equal[index], 0.0, (rewards - mean[index]) / (std[index] + eps))

# ---- Log-probabilities and loss -----------------------------------------------------------------------------------

def pack_rows(prompts: list[list[int]], responses: list[list[int]], row_tokens: int) -> list[list[int]]:
    """Answer indices, row by row: neighbours with the same prompt share a row of at most row_tokens, and one prompt."""
    rows, length = [], 0
    for i, (prompt, response) in enumerate(zip(prompts, responses)):
        if rows and prompt == prompts[rows[-1][0]] and length + len(response) <= row_tokens:
            rows[-1].append(i)
        else:
            rows.append([i])
            length = len(prompt)
        length += len(response)
    return rows

def response_logprobs(model, prompts: list[list[int]], responses: list[list[int]], *, temperature: float = 1.0,
                      row_tokens: int = 512) -> tuple[Tensor, Tensor]:
    """log pi_theta of all response tokens: n prompts, n responses (token ids) -> logprobs (n, t), mask (n, t).

    Answers that follow one another and have the same prompt are packed behind one copy of it: positions restart after
    the prompt, and a 4-D mask lets each answer see the prompt and itself only. Uses pack_rows, additive_mask,
    length_mask and token_logprobs. For models of the Llama and Qwen kind, whose logits are a plain product at the end.
    """
    rows, places = [], []  # rows of (token, position, segment); places: where the tokens of each answer are predicted
    for row in pack_rows(prompts, responses, row_tokens):
        start, cells = len(prompts[row[0]]), [(token, i, 0) for i, token in enumerate(prompts[row[0]])]  # segment 0
        for segment, i in enumerate(row, 1):  # the last token of an answer predicts nothing and is not read
            places.append([(len(rows), start - 1)] + [(len(rows), len(cells) + j) for j in range(len(responses[i]) - 1)])
            cells += [(token, start + j, segment) for j, token in enumerate(responses[i][:-1])]
        rows.append(cells)
    device, width = model.device, max(map(len, rows))
    cells = torch.tensor([cells + [(0, 0, -1)] * (width - len(cells)) for cells in rows], device=device)
    ids, positions, segments = cells.unbind(-1)  # (rows, width) each
    column = torch.arange(width, device=device)
    visible = (segments[:, None, :] == 0) | (segments[:, None, :] == segments[:, :, None])  # (rows, query, key)
    bias = additive_mask(visible & (column <= column[:, None]), model.dtype)
    hidden = model.base_model(ids, attention_mask=bias, position_ids=positions, use_cache=False).last_hidden_state
    index = torch.tensor([row * width + column for answer in places for row, column in answer], device=device)
    targets = torch.tensor([token for response in responses for token in response], device=device)
    hidden = hidden.flatten(0, 1).index_select(0, index)  # (all response tokens, d): no logits of anything else are made
    logprobs = token_logprobs(hidden, model.get_output_embeddings(), targets, temperature)
    mask = length_mask(responses, device)
    return torch.zeros(mask.shape, device=device).masked_scatter(mask, logprobs), mask

def token_logprobs(hidden: Tensor, head, targets: Tensor, temperature: float = 1.0) -> Tensor:
    """log pi(target): hidden (m, d), targets (m,) -> (m,) through head, the layer that makes logits.

    In chunks, whose logits are made again in the backward pass: all (m, V) of them at once would be the largest tensor
    of an update by far.
    """
    def logprobs(hidden: Tensor, targets: Tensor) -> Tensor:
        logits = head(hidden).float() / temperature  # (chunk, V)
        return logits.gather(1, targets[:, None])[:, 0] - logits.logsumexp(1)

    chunk = max(64, 2**24 // head.weight.shape[0])  # 64 MiB of fp32 logits
    if len(targets) <= chunk:
        return logprobs(hidden, targets)
    chunks = zip(hidden.split(chunk), targets.split(chunk))
    return torch.cat([checkpoint(logprobs, *pair, use_reentrant=False, preserve_rng_state=False) for pair in chunks])

def length_mask(responses: list[list[int]], device) -> Tensor:
    """(n, t) of booleans: which places hold a token when responses are written, left-aligned, into one tensor."""
    lengths = torch.tensor([len(response) for response in responses], device=device)
    return torch.arange(max(map(len, responses)), device=device) < lengths[:, None]

def policy_loss(logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, mask: Tensor, clip_low: float = 0.2,
                clip_high: float = 0.28, dual_clip: float | None = 10.0, num_tokens: int | None = None):
    """Eq. 3 and 4 as a loss: minus the mean over tokens of min(ratio * A, clip(ratio, 1 - clip_low, 1 + clip_high) * A).

    logprobs, old_logprobs, mask (n, t); advantages (n,), each for all tokens of its answer. No KL term, no entropy bonus.
    dual_clip (in the authors' code, not in the paper; None: off) bounds the loss where A < 0 at dual_clip * |A|.
    num_tokens: the tokens of the whole mini-batch if this is one micro-batch of it, whose losses then add up.
    Returns (loss, stats): the share of tokens that each clip decided, and the largest ratio.

    Replayed answers: the authors compute their old log-probs with the current policy, although another one wrote them
    at another temperature, and so do we. Their ratio starts at 1, and replay is imitation weighted by the advantage.
    """
    num_tokens, advantages = num_tokens or int(mask.sum()), advantages[:, None]
    ratio = torch.exp(torch.where(mask, logprobs - old_logprobs, 0.0))  # pi_theta / pi_old
    unclipped, clipped = ratio * advantages, ratio.clamp(1 - clip_low, 1 + clip_high) * advantages
    objective = torch.minimum(unclipped, clipped)
    floor = dual_clip * advantages if dual_clip else torch.full_like(advantages, -math.inf)
    bounded = mask & (advantages < 0) & (objective < floor)
    objective = torch.where(bounded, floor, objective)
    decided = mask & (clipped < unclipped)
    stats = {"clip_low": decided & (advantages < 0), "clip_high": decided & (advantages > 0), "dual_clip": bounded}
    stats = {name: hits.sum().item() / num_tokens for name, hits in stats.items()}
    return -(objective * mask).sum() / num_tokens, stats | {"ratio_max": ratio.max().item()}

# ---- The training step --------------------------------------------------------------------------------------------

class MasterAdamW:
    """AdamW with fp32 master weights, gradients and moments, for a model of any dtype.

    bf16 keeps 8 bits of a weight: a change below 1/256 of it, as at learning rate 1e-6 nearly every one is, rounds to
    nothing. So changes add up in an fp32 copy, from which the bf16 weight is rounded anew (an fp32 model is its own copy).
    Gradients move over during the backward pass: 2 + 4 + 4 + 8 bytes a weight in bf16, 16 in fp32.
    """
    def __init__(self, model, weight_decay: float = 0.1):
        self.params = [p for p in model.parameters() if p.requires_grad]
        self.masters = [p.detach().float() for p in self.params]  # float() of an fp32 tensor is the tensor itself
        self.adam = torch.optim.AdamW(self.masters, weight_decay=weight_decay)
        for param, master in zip(self.params, self.masters):
            param.register_post_accumulate_grad_hook(partial(self.take_gradient, master))

    @staticmethod
    def take_gradient(master: Tensor, param: Tensor) -> None:
        master.grad = param.grad.float() if master.grad is None else master.grad.add_(param.grad)
        param.grad = None

    def clear(self) -> None:
        for tensor in self.params + self.masters:
            tensor.grad = None

    @torch.no_grad()
    def step(self, learning_rate: float, max_grad_norm: float) -> float | None:
        """Clips the gradient, steps, clears it. Returns the norm; None, and no step, if that is not finite."""
        norm = torch.nn.utils.clip_grad_norm_(self.masters, max_grad_norm).item()
        if math.isfinite(norm):
            self.adam.param_groups[0]["lr"] = learning_rate
            self.adam.step()
            for param, master in zip(self.params, self.masters):
                param.copy_(master)
        self.clear()
        return norm if math.isfinite(norm) else None

def micro_batches(model, prompts, responses, micro_tokens: int):
    """Yields (answer indices, arguments of response_logprobs) for at most micro_tokens, padding included, or for one row.

    Rows (see pack_rows) of similar length go together, so that few tokens are padding. A row is about as long as the model
    is wide: attention, whose cost grows with the row, then takes a sixth of what the linear layers take.
    """
    row_tokens = min(max(256, model.config.hidden_size), micro_tokens)
    rows = pack_rows(prompts, responses, row_tokens)
    length = {row[0]: len(prompts[row[0]]) + sum(len(responses[i]) for i in row) for row in rows}
    rows.sort(key=lambda row: length[row[0]])
    while rows:
        count = max(1, min(len(rows), micro_tokens // length[rows[-1][0]]))  # the last row is the longest
        batch, rows = [i for row in rows[-count:] for i in row], rows[:-count]
        pair = {"prompts": [prompts[i] for i in batch], "responses": [responses[i] for i in batch]}
        yield batch, pair | {"row_tokens": row_tokens}

@torch.no_grad()
def all_logprobs(model, prompts, responses, micro_tokens: int, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
    """response_logprobs of any number of answers, in micro-batches and without gradients: pi_old of Eq. 3."""
    mask = length_mask(responses, model.device)
    logprobs = torch.zeros(mask.shape, device=model.device)
    for batch, part in micro_batches(model, prompts, responses, micro_tokens):
        part, _ = response_logprobs(model, **part, temperature=temperature)
        logprobs[batch, :part.shape[1]] = part
    return logprobs, mask

def accumulate_gradients(model, prompts, responses, advantages: Tensor, old_logprobs: Tensor | None, micro_tokens: int,
                         temperature: float = 1.0, **clip) -> dict[str, float]:
    """Adds the gradient of a mini-batch's policy_loss to the model's, in micro-batches; returns loss and statistics.

    advantages (n,); old_logprobs (n, t), or None while the policy is still the one that sampled: ratios are then 1.
    Answers of advantage 0 add nothing to the gradient and are skipped; their tokens stay in the mean.
    """
    model.train()
    num_tokens, total = sum(map(len, responses)), Counter(loss=0.0, clip_low=0.0, clip_high=0.0, dual_clip=0.0)
    used, ratio_max = advantages.nonzero()[:, 0].tolist(), 1.0
    for batch, part in micro_batches(model, [prompts[i] for i in used], [responses[i] for i in used], micro_tokens):
        batch = [used[i] for i in batch]
        logprobs, mask = response_logprobs(model, **part, temperature=temperature)
        old = logprobs.detach() if old_logprobs is None else old_logprobs[batch, :mask.shape[1]]
        loss, stats = policy_loss(logprobs, old, advantages[batch], mask, num_tokens=num_tokens, **clip)
        loss.backward()
        ratio_max = max(ratio_max, stats.pop("ratio_max"))
        total.update(stats, loss=loss.item())
    return {**total, "ratio_max": ratio_max}

def update_policy(model, optimizer: MasterAdamW, prompts, responses, advantages: Tensor, old_logprobs: Tensor | None,
                  memory: dict, *, learning_rate: float, max_grad_norm: float = 1.0, **options) -> dict[str, float]:
    """One optimizer step on one mini-batch. Where a GPU runs out of memory, halves memory["micro_tokens"] and repeats.

    Returns the statistics; "skipped" is 1 if loss or gradient was not finite and the step was therefore not taken.
    """
    while True:
        try:
            stats = accumulate_gradients(model, prompts, responses, advantages, old_logprobs, memory["micro_tokens"],
                                         **options)
            break
        except torch.cuda.OutOfMemoryError:
            if memory["micro_tokens"] <= max(len(p) + len(r) for p, r in zip(prompts, responses)):
                raise UserError("out of GPU memory with one answer at a time; try --gradient_checkpointing or a lower "
                                "--max_new_tokens") from None
        optimizer.clear()  # the mini-batch starts again, and its gradient is the same
        torch.cuda.empty_cache()
        memory["micro_tokens"] //= 2
        tqdm.write(f"out of GPU memory: going on with --micro_tokens {memory['micro_tokens']}, the result is the same")
    norm = optimizer.step(learning_rate, max_grad_norm) if math.isfinite(stats["loss"]) else None
    optimizer.clear()
    return stats | {"grad_norm": norm, "skipped": int(norm is None)}

@dataclass
class Rollout:
    """An answer in a group: fresh from the policy, or replayed from the pool."""
    group: int
    prompt: list[int]
    response: list[int]  # token ids, the end token included where there is one
    correct: bool
    reward: float
    replayed: bool = False

def score(policy: Policy, problem: Problem, response: list[int], config: Config) -> tuple[bool, float]:
    """Whether a response is correct, and its reward: 1 or -1, less the penalty on overlong answers. Yours goes here."""
    correct = verify(policy.text(response), problem.gold)
    penalty = overlong_penalty(len(response), config.max_new_tokens, config.overlong_buffer, config.overlong_factor)
    return correct, (1.0 if correct else -1.0) + penalty

def make_groups(policy, batch: list[Problem], pools: list[ExperiencePool], config, step: int, score=score) -> list[Rollout]:
    """G fresh answers a question and, from each pool, M replayed ones (section 3.2), group after group."""
    rollouts = []
    for group, (problem, answers) in enumerate(policy.answer(batch, config.group_size, config, "rollout", step)):
        prompt, rng = policy.prompt(problem), random.Random(seed_of(config.seed, "replay", step, problem.question))
        fresh = [Rollout(group, prompt, response, *score(policy, problem, response, config)) for response in answers]
        rollouts += fresh
        if not (config.rescue and any(rollout.correct for rollout in fresh)):
            drawn = [policy.tokens(text) for pool in pools for text in pool.draw(problem.question, config.replays, rng)]
            rollouts += [Rollout(group, prompt, response, *score(policy, problem, response, config), replayed=True)
                         for response in drawn]
    return rollouts

def train_step(policy, optimizer, batch: list[Problem], pools, config: Config, step: int, memory: dict, score=score) -> dict:
    """One rollout and its updates, every group with one baseline for all its answers (Eq. 4, 5). Returns the metrics."""
    clock, device = [time.perf_counter()], policy.model.device
    reset_peak(device)
    rollouts = make_groups(policy, batch, pools, config, step, score)
    clock.append(time.perf_counter())
    peaks = {"peak_sample_mib": reset_peak(device)}
    prompts, responses = [r.prompt for r in rollouts], [r.response for r in rollouts]
    rewards, group_ids = torch.tensor([r.reward for r in rollouts]), torch.tensor([r.group for r in rollouts])
    advantages = group_advantages(rewards, group_ids).to(device)
    old_logprobs, updates, temperature = None, [], config.temperature or 1.0
    if config.minibatch_prompts < len(batch):  # from the second update on, the policy is not the one that sampled
        old_logprobs, _ = all_logprobs(policy.model, prompts, responses, memory["micro_tokens"], temperature)
    clock.append(time.perf_counter())
    for first in range(0, len(batch), config.minibatch_prompts):
        own = [i for i, r in enumerate(rollouts) if first <= r.group < first + config.minibatch_prompts]
        updates.append(update_policy(
            policy.model, optimizer, [prompts[i] for i in own], [responses[i] for i in own], advantages[own],
            None if old_logprobs is None else old_logprobs[own], memory, max_grad_norm=config.max_grad_norm,
            learning_rate=config.learning_rate * min(1.0, step / max(1, config.lr_warmup_steps)), temperature=temperature,
            clip_low=config.clip_low, clip_high=config.clip_high, dual_clip=config.dual_clip or None))
    clock.append(time.perf_counter())
    seconds = dict(zip(("sample_s", "old_logp_s", "train_s", "step_s"), [*np.diff(clock).tolist(), clock[-1] - clock[0]]))
    metrics = step_metrics(rollouts, advantages.tolist(), updates, config.max_new_tokens)
    return metrics | seconds | peaks | {"peak_train_mib": reset_peak(device)}

def supervised_step(policy, optimizer, memory: dict, pairs: list[tuple], learning_rate: float) -> dict:
    """Maximum likelihood on (prompt, response) pairs, which is the policy gradient with an advantage of 1 for all."""
    prompts, responses = zip(*pairs)
    advantages = torch.ones(len(pairs), device=policy.model.device)
    stats = update_policy(policy.model, optimizer, prompts, responses, advantages, None, memory, learning_rate=learning_rate)
    return stats | {"trained_tokens": sum(map(len, responses)), "updates": 1}

def step_metrics(rollouts: list[Rollout], advantages: list[float], updates: list[dict], limit: int) -> dict:
    """What a step was like; the README explains each number."""
    fresh, trained = [r for r in rollouts if not r.replayed], [r for r, a in zip(rollouts, advantages) if a != 0]
    mean = {"accuracy": [r.correct for r in fresh], "reward": [r.reward for r in fresh],
            "length": [len(r.response) for r in fresh], "truncated": [len(r.response) == limit for r in fresh]}
    mean |= {name: [u[name] for u in updates] for name in ("loss", "clip_low", "clip_high", "dual_clip")}
    return {name: float(np.mean(values)) for name, values in mean.items()} | {
        "zero_variance": 1 - len({r.group for r in trained}) / len({r.group for r in rollouts}),
        "replays": len(rollouts) - len(fresh), "replays_failed": sum(r.replayed and not r.correct for r in rollouts),
        "resp_tokens": sum(mean["length"]), "trained_tokens": sum(len(r.response) for r in trained),
        "ratio_max": max(u["ratio_max"] for u in updates), "grad_norm": updates[-1]["grad_norm"],
        "skipped": sum(u["skipped"] for u in updates), "updates": len(updates)}

def reset_peak(device: torch.device) -> float | None:
    """The most memory used since the last call, in MiB: the tensors' on CUDA, the process's on Linux, else None."""
    if device.type == "cuda":
        peak = torch.cuda.max_memory_allocated() / 2**20
        torch.cuda.reset_peak_memory_stats()
        return peak
    try:
        peak = int(re.search(r"VmHWM:\s*(\d+)", Path("/proc/self/status").read_text())[1]) / 1024
        Path("/proc/self/clear_refs").write_text("5")
        return peak
    except OSError:
        return None

# ---- Evaluation ---------------------------------------------------------------------------------------------------

def mean_at_k(correct: list[list[bool]]) -> tuple[float, list[float]]:
    """The mean share of correct answers, and its 95% interval over questions (answers to one question are alike)."""
    shares = np.array([np.mean(row) for row in correct])
    half = 1.96 * shares.std(ddof=1) / math.sqrt(len(shares)) if len(shares) > 1 else 0.0
    return float(shares.mean()), [float(shares.mean() - half), float(shares.mean() + half)]

def pass_at_k(correct: list[list[bool]], k: int | None = None) -> float:
    """The chance that one of k answers is correct: 1 - C(n - c, k) / C(n, k), unbiased for n >= k answers a question."""
    return float(np.mean([1 - math.comb(len(row) - sum(row), k or len(row)) / math.comb(len(row), k or len(row))
                          for row in correct]))

def maj_at_k(answers: list[list[str | None]], correct: list[list[bool]]) -> float:
    """The share of questions whose most frequent extracted answer (the first, on a tie) is correct: Figure 3's Maj@32."""
    votes = [Counter(answer for answer in row if answer is not None).most_common(1) for row in answers]
    return float(np.mean([bool(vote) and marks[row.index(vote[0][0])] for vote, row, marks in zip(votes, answers, correct)]))

OUTCOMES = ("maj_at_k", "pass_at_k", "distinct", "entropy")

def evaluate(policy: Policy, problems: list[Problem], config: Config) -> dict:
    """k answers to each problem; one policy and seed always give one result. The README explains each number."""
    start, correct, extracted, distinct, first = time.perf_counter(), [], [], [], []
    for problem, responses in policy.answer(problems, config.k, config, "eval"):
        texts = [policy.text(response) for response in responses]
        correct.append([verify(text, problem.gold) for text in texts])
        extracted.append([extract_answer(text) for text in texts])
        right = [text for text, good in zip(texts, correct[-1]) if good]
        distinct += [len(set(right)) / len(right)] if right else []
        first.append((policy.prompt(problem), responses[0]))
    mean, interval = mean_at_k(correct)
    logprobs, mask = all_logprobs(policy.model, *zip(*first), config.micro_tokens, config.temperature or 1.0)
    return {"mean_at_k": mean, "ci95": interval, "maj_at_k": maj_at_k(extracted, correct), "pass_at_k": pass_at_k(correct),
            "distinct": float(np.mean(distinct or [0])), "entropy": -(logprobs.sum() / mask.sum()).item(),
            "eval_s": time.perf_counter() - start}

# ---- Checkpoints and metrics --------------------------------------------------------------------------------------

def write_whole(path: str | Path, content: str | Callable) -> None:
    """Writes a text, or what content(file) writes: a crash leaves the old file or the new one, never half of one."""
    try:
        with open(f"{path}.partial", "wb") as file:
            file.write(content.encode()) if isinstance(content, str) else content(file)
            file.flush()
            os.fsync(file.fileno())
    except RuntimeError as error:  # torch.save's word for a full disk
        raise UserError(f"{path}.partial: cannot be written ({str(error)[:150]}); make room, and start again") from None
    os.replace(f"{path}.partial", path)

def append_row(path: Path, row: dict) -> None:
    with open(path, "a") as file:
        file.write(json.dumps(row) + "\n")
        file.flush()
        os.fsync(file.fileno())

def read_json(path: Path) -> dict | None:
    """The content of a JSON file, None if there is no such file. Raises UserError if it is damaged."""
    try:
        return json.loads(path.read_text()) if path.exists() else None
    except ValueError:
        raise UserError(f"{path}: damaged; put it right, or --overwrite to start anew") from None

class RunFolder:
    """A run's folder: locked while in use, bound to its settings, and able to go on after a crash at any moment.

    Raises UserError if another process uses it, its settings differ (naming them), or it holds something else.
    """
    may_change = {"out", "overwrite", "device", "threads", "micro_tokens", "save_every", "preset", "prompts"}
    kept = {".lock", "base", "initial", "config.json.partial"}  # may be there before config.json is, and while others go

    def __init__(self, command: str, config: Config):
        self.path, self.settings, self.overwrite = Path(config.out), {"command": command, **asdict(config)}, config.overwrite
        self.path.mkdir(parents=True, exist_ok=True)
        self.lock = open(self.path / ".lock", "w")  # however the process ends, the system gives the lock back
        try:
            fcntl and fcntl.flock(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise UserError(f"{self.path}: another run is using this folder; wait for it, or give another --out") from None
        old = read_json(self.path / "config.json")
        if old is None and not {entry.name for entry in self.path.iterdir()} <= self.kept:
            raise UserError(f"{self.path}: the folder is not empty and holds no run; give another --out")
        old = self.settings if old is None or self.overwrite else old
        longer = command == old["command"] == "train" and config.steps > old["steps"]  # may be extended
        differing = [f"--{name} {old.get(name)} there, {value} here" for name, value in self.settings.items()
                     if old.get(name) != value and name not in self.may_change and not (longer and name == "steps")]
        if differing:
            raise UserError(f"{self.path}: holds another run ({'; '.join(differing)}); give another --out, or --overwrite")

    def begin(self) -> None:
        """Binds the folder to the settings, once the inputs have proved good; --overwrite deletes what it held."""
        entries = sorted(self.path.iterdir(), key=lambda entry: entry.name == "config.json")  # that one goes last
        for entry in entries if self.overwrite else ():
            if entry.name not in self.kept:
                shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
        self.overwrite = False
        write_whole(self.path / "config.json", json.dumps(self.settings, indent=1))

    def finished(self, name: str) -> dict | None:
        """The result in the JSON file of that name, if it is there and neither to be extended nor to be overwritten."""
        result = None if self.overwrite else read_json(self.path / name)
        if result is None or result.get("step", math.inf) < self.settings["steps"]:
            return None
        print(f"{self.path}: finished already; --overwrite starts anew", file=sys.stderr)
        return result

    def save(self, policy: Policy, optimizer: MasterAdamW, progress: dict) -> None:
        """The checkpoint. Random states and data order are not in it: they follow from seed and step (seed_of)."""
        state = {"model": policy.model.state_dict(), "masters": optimizer.masters, "adam": optimizer.adam.state_dict()}
        write_whole(self.path / "checkpoint.pt", partial(torch.save, state | {"progress": progress}))

    def load(self, policy: Policy, optimizer: MasterAdamW, progress: dict) -> dict:
        """Restores the checkpoint, writes the metrics up to it anew, and returns its progress; without one, that given."""
        file = self.path / "checkpoint.pt"
        try:
            if file.exists():
                state = torch.load(file, map_location="cpu", weights_only=True)
                policy.model.load_state_dict(state["model"])
                optimizer.adam.load_state_dict(state["adam"])
                for master, saved in zip(optimizer.masters, state["masters"], strict=True):
                    master.copy_(saved)
                progress = state["progress"]
        except Exception as error:  # a damaged file can raise nearly anything
            raise UserError(f"{file}: damaged or foreign ({str(error)[:150]}); put it right, or --overwrite") from None
        write_whole(self.path / "metrics.jsonl", "".join(json.dumps(row) + "\n" for row in progress["rows"]))
        return progress

# ---- The phases ---------------------------------------------------------------------------------------------------

def make_base(config: Config, path: Path) -> str:
    """The embedded base model's folder. Its warm-up stands in for pretraining and is no part of the paper."""
    if config.overwrite or not (path / "summary.json").exists():
        save_random_model(path / "initial", seed_of(config.seed, "weights"))
    problems = embedded_problems(64, seed=0)
    train(Config(model=str(path / "initial"), out=str(path), seed=config.seed, device=config.device, steps=0,
                 sft_steps=config.warmup_steps, learning_rate=4e-3, weight_decay=0.01, micro_tokens=config.micro_tokens,
                 overwrite=config.overwrite), problems, problems, warm_up_lesson)
    return str(path / "policy")

def warm_up_lesson(policy: Policy, config: Config, step: int) -> tuple[list, float]:
    """(prompt, response) pairs and learning rate of a warm-up step: the rate rises over a tenth, then falls as a cosine."""
    number, pairs = step + config.sft_steps, []
    for problem, given, rest in warm_up_examples(number, random.Random(seed_of(config.seed, "warm-up", number))):
        pairs.append((policy.prompt(problem) + policy.tokens(given)[:-1], policy.tokens(rest)))
    done = (number + 1) / config.sft_steps
    return pairs, config.learning_rate * min(10 * done, 0.5 + 0.5 * math.cos(math.pi * done))

def pool_lesson(problems: list[Problem], pool: ExperiencePool, policy, config: Config, step: int) -> tuple[list, float]:
    """The same for supervised fine-tuning on the pool, the obvious alternative to replay."""
    rng = random.Random(seed_of(config.seed, "sft", step))
    drawn = [rng.choice(problems) for _ in range(config.prompts_per_step * config.group_size)]
    pairs = [(policy.prompt(problem), policy.tokens(*pool.draw(problem.question, 1, rng))) for problem in drawn]
    return pairs, config.learning_rate

def question_order(count: int, seed: int, first: int, number: int) -> list[int]:
    """Places first to first + number - 1 in the endless sequence of shuffled epochs over count questions."""
    order = []
    for epoch in range(first // count, (first + number - 1) // count + 1):
        order += random.Random(seed_of(seed, "order", epoch)).sample(range(count), count)
    return order[first % count:first % count + number]

def load_pools(config: Config, problems: list[Problem], policy: Policy) -> tuple[list[ExperiencePool], list[Problem]]:
    """The pools to replay, and the problems they cover: the others are left out, the paper's rule. Raises UserError."""
    pools = [ExperiencePool.load(config.pool)]
    if config.replay_failed:
        pools.append(ExperiencePool.load(Path(config.pool).with_name("failed.jsonl"), failed=True))
    covered = [pool.keep_for(problems, lambda text: len(policy.tokens(text)) <= config.max_new_tokens) for pool in pools][0]
    left_out = [f"{count} answers {reason}" for pool in pools for reason, count in pool.left_out.items() if count]
    if left_out or len(covered) < len(problems):
        left_out.append(f"{len(problems) - len(covered)} training questions without an answer")
        print(f"{config.pool}: left out {', '.join(left_out)}", file=sys.stderr)
    if not covered:
        raise UserError(f"{config.pool}: no answer to a training question; was it made with these --data and --instruction?")
    if config.replays > (most := max(len(pools[0].answers[problem.question]) for problem in covered)):
        raise UserError(f"--replays {config.replays}: {config.pool} has at most {most} answers a question; lower it")
    return pools, covered

def train(config: Config, problems: list[Problem], held_out: list[Problem], lesson: Callable | None = None) -> dict:
    """One arm from the base model: RLEP with --pool, vanilla RL without. Leaves OUT/policy; returns its summary.

    Steps below 0, if there are any, are supervised_step's on what lesson gives; step 0 only evaluates; the others are
    train_step's.
    """
    folder, size = RunFolder("train", config), config.prompts_per_step
    if summary := folder.finished("summary.json"):
        return summary
    policy = Policy(config.model or make_base(config, folder.path / "base"), config.device, config.gradient_checkpointing)
    optimizer, memory = MasterAdamW(policy.model, config.weight_decay), {"micro_tokens": config.micro_tokens}
    pools, problems = load_pools(config, problems, policy) if config.pool else ([], problems)
    if len(problems) < size:
        raise UserError(f"--prompts_per_step {size}: there are only {len(problems)} training questions; lower it")
    if config.sft_steps:
        lesson, pools = lesson or partial(pool_lesson, problems, pools[0]), []
    folder.begin()
    nothing = {"step": -config.sft_steps - 1, "tokens": 0, "bad": 0, "seconds": 0.0, "rows": []}
    progress = folder.load(policy, optimizer, nothing)
    label = "RLEP" if pools else "vanilla RL" if config.steps else "warm-up in place of pretraining"
    steps = range(progress["step"] + 1, config.steps + 1)
    for step in tqdm(steps, label, config.sft_steps + config.steps + 1, initial=config.sft_steps + steps.start):
        start, row = time.perf_counter(), {"step": step}
        if step < 0:
            row |= supervised_step(policy, optimizer, memory, *lesson(policy, config, step))
        elif step > 0:
            batch = [problems[i] for i in question_order(len(problems), config.seed, (step - 1) * size, size)]
            row |= train_step(policy, optimizer, batch, pools, config, step, memory)
        progress["tokens"] += row.get("resp_tokens", 0) + row.get("trained_tokens", 0)
        progress["bad"] = progress["bad"] + row["skipped"] if row.get("skipped") == row.get("updates", 1) else 0
        if step >= 0:
            if step % config.eval_every == 0 or step == config.steps:
                row |= evaluate(policy, held_out, config)
                tqdm.write(f"{label}, step {step}: {accuracy_line(row)}")
            progress["rows"].append(row | {"tokens": progress["tokens"]})
            append_row(folder.path / "metrics.jsonl", progress["rows"][-1])
        progress |= {"step": step, "seconds": progress["seconds"] + time.perf_counter() - start}
        if step % (config.save_every if step > 0 else 100) == 0 or step == config.steps:
            folder.save(policy, optimizer, progress)
        if progress["bad"] >= 10:
            raise UserError(f"{folder.path}: loss or gradient not finite in 10 updates running; lower --learning_rate")
    policy.save(folder.path / "policy")
    summary = summarise(progress.pop("rows")) | progress
    write_whole(folder.path / "summary.json", json.dumps(summary, indent=1))
    folder.lock.close()
    return summary

def summarise(rows: list[dict]) -> dict:
    """An arm's summary, from its metrics."""
    evaluated = [row for row in rows if "mean_at_k" in row]
    last, curve = evaluated[-1], [[row["step"], row["mean_at_k"]] for row in evaluated]
    return {"curve": curve, "peak": max(value for _, value in curve), "final": last["mean_at_k"], "final_ci95": last["ci95"],
            "seconds_per_step": float(np.median([row["step_s"] for row in rows if "step_s" in row] or 0)),
            "compute": [row["tokens"] for row in evaluated], **{name: last[name] for name in OUTCOMES}}

def collect(config: Config, problems: list[Problem], folder: RunFolder) -> dict:
    """Experience collection (section 3.2): K answers a question from the seed policy --model, verified, into the pool.

    Questions answered correctly fewer than two times are left out. Leaves pool.jsonl; returns its statistics.
    """
    if result := folder.finished("collection.json"):
        return result
    policy, path, journal = Policy(config.model, config.device), folder.path, folder.path / "collection.partial.jsonl"
    folder.begin()
    settings = replace(config, temperature=config.collect_temperature, top_p=config.collect_top_p)
    rows = [json.loads(line) for line in open(journal) if line.endswith("\n")] if journal.exists() else []
    batch = max(1, config.sample_rows // config.collect_k)
    rows = rows[:len(rows) // batch * batch]  # an interrupted batch is sampled again, as it was
    write_whole(journal, "".join(json.dumps(row) + "\n" for row in rows))
    sampled, start = policy.answer(problems, config.collect_k, settings, "collect", first=len(rows)), time.perf_counter()
    for problem, responses in tqdm(sampled, "experience collection", len(problems), initial=len(rows)):
        texts = [policy.text(response) for response in responses if response[-1] in policy.ends]  # those not cut short
        rows.append({"texts": texts, "tokens": sum(map(len, responses)), "seconds": time.perf_counter() - start})
        append_row(journal, rows[-1])
        start = time.perf_counter()
    pools = {"pool.jsonl": ExperiencePool()}
    if config.replay_failed:
        pools["failed.jsonl"] = ExperiencePool(failed=True)
    for problem, row in zip(problems, rows):
        enough = sum(verify(text, problem.gold) for text in row["texts"]) >= 2
        for text, pool in ((text, pool) for text in row["texts"] for pool in pools.values() if enough):
            pool.add(problem.question, problem.gold, text, problem.chat)
    if not len(pool := pools["pool.jsonl"]):
        raise UserError(f"{config.model}: solved no question twice in {config.collect_k} tries; train it longer")
    for name, texts in pools.items():
        texts.save(path / name)
    seed_run = read_json(Path(config.model).parent / "summary.json") or {}  # what the seed policy cost, if known
    total = {name: sum(row[name] for row in rows) for name in ("seconds", "tokens")}
    result = {"questions": len(pool.questions()), "answers": len(pool), "left_out": len(problems) - len(pool.questions()),
              "most": max(map(len, pool.answers.values())), "seconds": total["seconds"],
              "tokens": total["tokens"] + seed_run.get("tokens", 0)}
    write_whole(path / "collection.json", json.dumps(result))
    journal.unlink()
    return result

def run(config: Config, problems: list[Problem], held_out: list[Problem]) -> dict:
    """The whole method: base model, vanilla RL, collection, replay training from the base model, side by side."""
    folder, path = RunFolder("run", config), Path(config.out)
    if summary := folder.finished("summary.json"):
        return summary
    base = config.model or make_base(config, path / "base")
    if config.model:
        Policy(base, config.device)  # a bad --model must be found before anything is deleted
    folder.begin()
    arm = replace(config, model=base, pool=None, overwrite=False)
    vanilla = train(replace(arm, out=str(path / "vanilla")), problems, held_out)
    pool = collect(replace(arm, model=str(path / "vanilla/policy")), problems, folder)
    rlep = train(replace(arm, out=str(path / "rlep"), pool=str(path / "pool.jsonl"),
                         replays=min(config.replays, pool["most"])), problems, held_out)
    warm_up = read_json(path / "base/summary.json") or {"seconds": 0.0}
    phases = {"warm-up": warm_up, "vanilla": vanilla, "collection": pool, "rlep": rlep}
    seconds = {name: phase["seconds"] for name, phase in phases.items()}
    summary = {"base": vanilla["curve"][0][1], "arms": {"vanilla": vanilla, "rlep": rlep}, "pool": pool,
               "steps_to_baseline_peak": steps_to(rlep["curve"], vanilla["peak"]), "seconds": sum(seconds.values()),
               "seconds_by_phase": seconds, "config": asdict(config), "table": compare([path], path / "curves.png")}
    write_whole(path / "summary.json", json.dumps(summary, indent=1))
    folder.lock.close()
    return summary

# ---- Comparing runs -----------------------------------------------------------------------------------------------

def steps_to(curve: list, level: float) -> int | None:
    """The first evaluated step at which a curve reaches a level, or None."""
    return next((step for step, value in curve if value >= level), None)

def accuracy_line(row: dict) -> str:
    low, high = row["ci95"]
    return (f"mean@k {row['mean_at_k']:.1%} ({low:.1%} to {high:.1%}), maj@k {row['maj_at_k']:.1%}, "
            f"pass@k {row['pass_at_k']:.1%}")

def over_seeds(values: list[float]) -> tuple[float, float]:
    """The mean, and half the width of its 95% interval (Student's t; 0 for a single seed)."""
    t95, n = [12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26], len(values)  # for 2, 3, ... 10 seeds
    half = (t95[n - 2] if n < 11 else 1.96) * np.std(values, ddof=1) / math.sqrt(n) if n > 1 else 0.0
    return float(np.mean(values)), float(half)

def read_arms(folders: list[str | Path]) -> dict[str, dict[int, dict]]:
    """{arm: {seed: summary}} of run folders, `run`'s counting as its two arms. Raises UserError if one is unfinished."""
    arms = {}
    parts = [[Path(f) / arm for arm in ("vanilla", "rlep") if (Path(f) / arm).is_dir()] or [Path(f)] for f in folders]
    for path in sum(parts, []):
        config, summary = read_json(path / "config.json"), read_json(path / "summary.json")
        if not config or not summary or "curve" not in summary:
            raise UserError(f"{path}: not a finished run, it has no summary.json; finish it, or leave it out")
        name = f"RLEP, M={config['replays']}" if config["pool"] else "vanilla RL"
        name += " and M failed" * config["replay_failed"] + ", rescue" * config["rescue"]
        name = "SFT, then vanilla" if config["sft_steps"] else name
        pool = read_json(Path(config["pool"]).parent / "collection.json") if config["pool"] else None
        summary["compute"] = [tokens + (pool or {"tokens": 0})["tokens"] for tokens in summary["compute"]]
        arms.setdefault((name, config["steps"]), {})[config["seed"]] = summary
    if not arms:
        raise UserError("plot needs run folders: rlep.py plot RUN [RUN ...]")
    fewest = min(steps for _, steps in arms)
    return {name if steps == fewest else f"{name}, {steps} steps": runs for (name, steps), runs in arms.items()}

def compare(folders: list[str | Path], picture: Path) -> str:
    """Draws the arms' curves into picture; returns a Markdown table, means over seeds with 95% intervals."""
    arms = read_arms(folders)
    draw(arms, picture)
    lines = [f"| | {' | '.join(arms)} |", "|---" * (len(arms) + 1) + "|",
             f"| seeds | {' | '.join(str(len(runs)) for runs in arms.values())} |"]

    def add(title, form, value_of):
        cells = []
        for runs in arms.values():
            values = [value_of(run, arms.get("vanilla RL", {}).get(seed)) for seed, run in runs.items()]
            mean, half = over_seeds([value for value in values if value is not None] or [math.nan])
            never = f" ({values.count(None)} never)" if 0 < values.count(None) < len(values) else ""
            cells.append("-" if math.isnan(mean) else format(mean, form) + f" ± {half:{form[-3:]}}" * (half > 0) + never)
        lines.append(f"| {title} | {' | '.join(cells)} |")

    for step in sorted({step for runs in arms.values() for run in runs.values() for step, _ in run["curve"]}):
        add(f"mean@k, step {step}", ".1%", lambda run, base: dict(run["curve"]).get(step))
    add("final minus vanilla's", "+.1%", lambda run, base: run["final"] - base["final"] if base else None)
    add("step of vanilla's peak", ".1f", lambda run, base: steps_to(run["curve"], base["peak"]) if base else None)
    for name in OUTCOMES:
        add(name, ".3f" if name == "entropy" else ".1%", lambda run, base: run[name])
    add("seconds a step", ".2f", lambda run, base: run["seconds_per_step"])
    add("million tokens", ".2f", lambda run, base: run["compute"][-1] / 1e6)
    return "\n".join(lines)

def draw(arms: dict[str, dict[int, dict]], picture: Path) -> None:
    """Accuracy against steps, and against tokens sampled and trained: means over seeds with 95% bands."""
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot
    figure, axes = pyplot.subplots(1, 2, figsize=(11, 4.2), sharey=True)
    for name, runs in arms.items():
        points = [{step: (value, tokens) for (step, value), tokens in zip(run["curve"], run["compute"])}
                  for run in runs.values()]
        steps = sorted(set.intersection(*map(set, points)))  # those that all seeds were evaluated at
        mean, half = 100 * np.array([over_seeds([point[step][0] for point in points]) for step in steps]).T
        tokens = [np.mean([point[step][1] for point in points]) / 1e6 for step in steps]
        for axis, x in zip(axes, (steps, tokens)):
            line, = axis.plot(x, mean, marker=".", label=name)
            axis.fill_between(x, mean - half, mean + half, color=line.get_color(), alpha=0.15, linewidth=0)
    axes[0].set(xlabel="step", ylabel="accuracy on held-out problems, mean@k (%)")
    axes[1].set(xlabel="million tokens sampled and trained, seed policy and collection included")
    axes[0].legend()
    figure.tight_layout()
    figure.savefig(picture, dpi=110)
    pyplot.close(figure)

def bench(config: Config) -> None:
    """Prints time and memory of whole steps on --prompts with random rewards: medians of --steps, and a JSON line."""
    if not config.model or not config.prompts:
        raise UserError("bench needs --model and --prompts FILE.jsonl, with a {\"prompt\": text or chat list} a line")
    policy, coin = Policy(config.model, config.device, config.gradient_checkpointing), random.Random(config.seed)
    rows = list(read_rows(config.prompts))
    problems = [row_to_problem(row | {"answer": "0"}, where) for where, row in rows]
    if isinstance(rows[0][1].get("prompt"), str):  # a text is read as it is
        policy.tokenizer.chat_template = "{{ messages[-1]['content'] }}"
    optimizer, memory, steps = MasterAdamW(policy.model, config.weight_decay), {"micro_tokens": config.micro_tokens}, []
    for step in tqdm(range(config.steps + 2), "bench"):  # the first warms up; only the last has an old-log-prob pass
        # at learning rate 0 the steps are alike
        settings = replace(config, learning_rate=0.0, minibatch_prompts=max(1, len(rows) - (step > config.steps)))
        steps.append(train_step(policy, optimizer, problems, [], settings, step, memory,
                                lambda *_: (False, coin.choice((-1.0, 1.0)))))
    result = {"old_logp_s": steps.pop()["old_logp_s"]}
    for name in ("resp_tokens", "sample_s", "train_s", "step_s", "peak_sample_mib", "peak_train_mib"):
        result[name] = float(np.median([step[name] or math.nan for step in steps[1:]]))
    result |= {f"{name}_tokens_per_s": result["resp_tokens"] / result[f"{name}_s"] for name in ("sample", "train", "step")}
    print("\n".join(f"{name:>22} {value:12.3f}" for name, value in result.items()), json.dumps(result), sep="\n")

# ---- The command line ---------------------------------------------------------------------------------------------

COMMANDS = ("run", "train", "collect", "eval", "plot", "bench")

class Parser(HfArgumentParser):
    def error(self, message: str):
        raise UserError(f"{message}; rlep.py --help lists the flags")

def parse(argv: list[str]) -> tuple[str, list[str], Config]:
    """The command, the folders to plot, and the checked configuration. Raises UserError."""
    parser = Parser(Config, usage=__doc__.split("\n\n")[1], allow_abbrev=False)
    parser.add_argument("words", nargs="*", help=argparse.SUPPRESS)
    parser.set_defaults(**PRESETS.get(parser.parse_intermixed_args(argv).preset, {}))
    values = vars(parser.parse_intermixed_args(argv))
    command, *folders = values.pop("words") or ["run"]
    if command not in COMMANDS or (folders and command != "plot"):
        raise UserError(f"{' '.join([command, *folders])}: not a command; the commands are {', '.join(COMMANDS)}")
    may_be_0 = ("seed", "threads", "micro_tokens", "replays", "sft_steps", "lr_warmup_steps", "overlong_buffer")
    for name, value in values.items():
        least = 2 if name == "group_size" else 0 if isinstance(value, float) or name in may_be_0 else 1
        if type(value) in (int, float) and not value >= least:
            raise UserError(f"--{name} {value}: must be at least {least}")
        if name.endswith("top_p") and not 0 < value <= 1:
            raise UserError(f"--{name} {value}: must be above 0 and at most 1")
    if values["sft_steps"] and not values["pool"]:
        raise UserError("--sft_steps: needs --pool FILE")
    if values["device"] == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: there is no usable CUDA GPU here; leave --device out to use what there is")
    if values["device"] == "auto":
        values["device"] = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    about = "-".join(Path(values[name] or "embedded").stem for name in ("model", "data"))
    values["out"] = values["out"] or f"runs/{command}-{about}-seed{values['seed']}"
    values["micro_tokens"] = values["micro_tokens"] or (1024 if values["device"] == "cpu" else 16384)
    return command, folders, Config(**values)

def execute(command: str, folders: list[str], config: Config) -> None:
    """Runs a command and prints its result."""
    out = Path(config.out)
    if config.threads:
        torch.set_num_threads(config.threads)
    if command == "bench":
        return bench(config)
    if command == "plot":
        out.mkdir(parents=True, exist_ok=True)
        return print(compare(folders, out / "curves.png"), f"picture: {out / 'curves.png'}", sep="\n\n")
    if command == "eval" and config.data and not config.eval_data:
        config = replace(config, data=None, eval_data=config.data)
    problems, held_out = load_problems(config)
    if command == "run":
        summary = run(config, problems, held_out)
        phases = ", ".join(f"{name} {seconds / 60:.1f}" for name, seconds in summary["seconds_by_phase"].items())
        print(f"{summary['table']}\n\npool: {summary['pool']['answers']} verified answers to {summary['pool']['questions']} "
              f"questions. {summary['seconds'] / 60:.1f} minutes: {phases}. Everything is in {out}/")
    elif command == "train":
        print(f"final mean@k {train(config, problems, held_out)['final']:.1%}; the policy is {out / 'policy'}")
    elif command == "collect":
        folder = RunFolder("collect", config)
        pool = collect(replace(config, model=config.model or make_base(config, out / "base")), problems, folder)
        print(f"{pool['answers']} verified answers to {pool['questions']} questions are in {out / 'pool.jsonl'}")
    else:
        policy = Policy(config.model or make_base(config, out / "base"), config.device)
        print(accuracy_line(evaluate(policy, held_out, config)))

def main(argv: list[str] | None = None) -> int:
    """Returns the exit status: 0, 2 for bad input (one line says what to do), 130 after Ctrl-C."""
    disable_progress_bar()
    try:
        execute(*parse(sys.argv[1:] if argv is None else argv))
        return 0
    except (UserError, OSError) as error:
        print("rlep.py: error:", " ".join(str(error).split()), file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nrlep.py: stopped; the same command goes on from the last checkpoint", file=sys.stderr)
        return 130

if __name__ == "__main__":
    sys.exit(main())
