#!/usr/bin/env python3
"""Measure accuracy on PIQA by the streamed evaluation, and compare its answers to the first questions with those of plain transformers.

Usage: piqa.py NAME=FOLDER ... [--questions 1838] [--plain 200] [--threads 1] [--results FILE]

FOLDER is an original or a quantized model, NAME the name of its row. Plain transformers computes each request alone, without padding. Rows
that the result file contains are not measured again.
"""

import argparse
import json
import time
from pathlib import Path

import torch
from measure import load, save
from transformers import AutoModelForCausalLM, CompressedTensorsConfig

from cbqstream.calibration.tokenizer import load_tokenizer
from cbqstream.evaluation.choices import evaluate_choices, read_questions

HERE = Path(__file__).resolve().parent
DATA = HERE / "data" / "piqa-validation.jsonl"


def plain_answers(folder: Path, number: int) -> list[int]:
    """Number of the likeliest choice of each of the first `number` questions, by transformers alone."""
    packed = json.loads((folder / "config.json").read_text()).get("quantization_config")
    options = {"quantization_config": CompressedTensorsConfig(dequantize=True)} if packed else {}
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **options).eval()
    tokenizer, answers = load_tokenizer(folder), []
    for question in read_questions(DATA, number):
        scores = []
        for choice in question.choices:
            first = len(tokenizer(question.prompt)["input_ids"])
            ids = torch.tensor(tokenizer(question.prompt + choice)["input_ids"])
            with torch.no_grad():
                logs = model(ids.unsqueeze(0), use_cache=False).logits[0].log_softmax(-1)
            scores.append(logs[first - 1 : -1].gather(1, ids[first:].unsqueeze(1)).sum().item())
        answers.append(max(range(len(scores)), key=scores.__getitem__))
    return answers


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", metavar="NAME=FOLDER", help="name of a row, and folder of its model")
    parser.add_argument("--questions", type=int, default=1838, help="number of questions")
    parser.add_argument("--plain", type=int, default=200, help="number of questions for plain transformers")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads")
    parser.add_argument("--results", type=Path, default=HERE / "results" / "piqa.json", help="JSON file for the rows")
    args = parser.parse_args()
    for name, _, folder in (model.partition("=") for model in args.models):
        if name not in load(args.results):
            began = time.monotonic()
            found = evaluate_choices(
                Path(folder), DATA, num_questions=args.questions, threads=args.threads, device="cpu"
            )
            row = {"by_sum": found.by_sum, "by_character": found.by_character, "questions": len(found.answers)}
            row["seconds"] = time.monotonic() - began
            plain = plain_answers(Path(folder), args.plain)
            row["plain"] = len(plain)
            row["same as plain"] = sum(one == other for one, other in zip(plain, found.answers, strict=False))
            save(args.results, name, row)
    print(
        "| model | by sum | by character | questions | same answers as plain transformers | seconds |\n|---|---|---|---|---|---|"
    )
    for name, row in load(args.results).items():
        shares = f"{row['by_sum']:.2%} | {row['by_character']:.2%} | {row['questions']:,}"
        print(f"| {name} | {shares} | {row['same as plain']} of {row['plain']} | {row['seconds']:.0f} |")


if __name__ == "__main__":
    main()
