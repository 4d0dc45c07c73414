"""Writes arithmetic.jsonl, the README's problems for a real model: arithmetic.py [FILE]

"What is 3 * 4 + 5?", with two or three operations, after two solved examples in the chat.
"""
import json
import random
import sys

SOLVED = [
    ("What is 3 * 4 + 5?", "3 * 4 = 12. 12 + 5 = 17. Answer: 17"),
    ("What is 6 * 2 - 3 + 8?", "6 * 2 = 12. 12 - 3 = 9. 9 + 8 = 17. Answer: 17"),
]


def main(path: str = "arithmetic.jsonl") -> None:
    """Writes 1,000 different problems, the same ones each time."""
    chat = []
    for question, answer in SOLVED:
        chat.append({"role": "user", "content": question})
        chat.append({"role": "assistant", "content": answer})
    rng, problems = random.Random(0), {}
    while len(problems) < 1000:
        first, second, *rest = [rng.randint(2, 9) for _ in range(rng.choice((3, 4)))]
        text = f"{first} * {second}"
        result = first * second
        for number in rest:
            sign = rng.choice("+-")
            text += f" {sign} {number}"
            result += number if sign == "+" else -number
        problems[f"What is {text}?"] = result
    with open(path, "w", encoding="utf-8") as file:
        for question, answer in problems.items():
            prompt = [*chat, {"role": "user", "content": question}]
            file.write(json.dumps({"prompt": prompt, "answer": answer}) + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
