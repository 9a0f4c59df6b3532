"""``fastattn generate``: stream text from a model, or answer a file of prompts."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from fastattn.cli import device
from fastattn.cli.flags import add_model
from fastattn.cli.sampling import add_sampling, check_positive, sampling_of
from fastattn.errors import DataError, input_error


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    text = (
        "Continue a prompt with a model of fastattn or of Hugging Face, printing the text as it is generated; an "
        "encoder-decoder answers it. With --prompts, process several at a time and write a JSON line for each."
    )
    parser = commands.add_parser("generate", help="generate text from a model", description=text)
    add_model(parser)
    parser.add_argument(
        "--prompt", default="", metavar="TEXT",
        help="beginning of the text, or its source (default: none); - reads standard input",
    )  # fmt: skip
    parser.add_argument("--image", metavar="FILE", help="what the text is about, of a model for caption or vqa")
    parser.add_argument("--tokens", type=int, default=200, metavar="N", help="most tokens to generate (default 200)")
    _add_beams(add_sampling(parser))
    _add_guesses(parser)
    many = parser.add_argument_group("many prompts")
    many.add_argument(
        "--prompts",
        type=Path,
        metavar="FILE",
        help='a prompt in each line, or .jsonl lines with a "prompt", or a folder of files; - is standard input',
    )
    many.add_argument(
        "--out", type=Path, metavar="FILE", help="of results, resumed if it exists (default: FILE.out.jsonl)"
    )
    many.add_argument("--batch", type=int, default=8, metavar="N", help="sequences at a time (default 8)")
    many.add_argument("--pages", type=int, metavar="N", help="pages of the cache (default: what --batch could need)")
    parser.add_argument(
        "--page-size",
        type=int,
        metavar="N",
        help="tokens in a page of the cache (default: no pages; with --prompts 16)",
    )
    parser.add_argument("--no-cache", action="store_true", help="compute every token anew: slower, the same text")
    parser.add_argument("--attention", choices=("fastattn", "eager"), help="instead of what the run used")
    device.add_flag(parser)
    parser.set_defaults(run=run)


def _add_beams(group: Any) -> None:
    group.add_argument("--beams", type=int, metavar="N", help="beam search for the likeliest text, instead of drawing")
    group.add_argument(
        "--length-penalty", type=float, default=1.0, metavar="X", help="above 1 favours long beams (default 1)"
    )


def _add_guesses(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("guesses, which the model checks several at a time: the same text, faster")
    group.add_argument(
        "--assistant", type=Path, metavar="DIR", help="a smaller model with the same tokenizer, which guesses ahead"
    )
    group.add_argument(
        "--prompt-lookup", type=int, metavar="N", help="guess up to N tokens that followed earlier in the text"
    )


def run(args: argparse.Namespace) -> int:
    from fastattn.lm.generate import Acceptance
    from fastattn.lm.load import load_image, load_texts
    from fastattn.lm.train import find_model

    _check(args)
    sampling = sampling_of(args)
    checkpoint = find_model(args.checkpoint, best=True)
    texts, _ = load_texts(checkpoint, device.choose(args.device), args.attention, stop=args.stop)
    if args.prompts is not None:
        return _continue_all(args, texts, sampling)
    prompt = sys.stdin.read() if args.prompt == "-" else args.prompt
    cache: dict[str, Any] = {"use_cache": not args.no_cache, "page_size": args.page_size}
    if args.image is not None:
        cache["image"] = load_image(checkpoint, args.image, texts.model)
    counts: Acceptance | None = None
    if args.beams is not None:
        penalties = {"length_penalty": args.length_penalty, "repetition_penalty": args.repetition_penalty}
        pieces = iter([texts.best(prompt, args.tokens, beams=args.beams, **penalties, **cache)])
    else:
        counts = Acceptance()
        guesses = {"assistant": _assistant(args, texts), "prompt_lookup": args.prompt_lookup, "acceptance": counts}
        pieces = texts.stream(prompt, args.tokens, sampling, **cache, **guesses)
    if texts.model.config.kind != "encoder-decoder":  # continues the prompt, where an encoder-decoder answers it
        print(prompt, end="", flush=True)
    for piece in pieces:
        print(piece, end="", flush=True)
    print()
    if counts is not None and counts.calls:
        print(counts, file=sys.stderr)
    return 0


def _assistant(args: argparse.Namespace, texts: Any) -> Any:
    """The model that guesses ahead, or None.

    Raises:
        InputError: its tokenizer is another.
    """
    from fastattn.lm.load import load_texts
    from fastattn.lm.train import find_model

    if args.assistant is None:
        return None
    found, _ = load_texts(find_model(args.assistant, best=True), device.choose(args.device), args.attention)
    if found.tokenizer.get_vocab() != texts.tokenizer.get_vocab():
        todo = "Train it with the tokenizer of the model."
        raise input_error("--assistant", args.assistant, "a model with the same tokenizer", todo)
    return found.model


def _check(args: argparse.Namespace) -> None:
    check_positive(args, "tokens", "beams", "batch", "pages", "page_size", "prompt_lookup")
    others = (("--beams", args.beams), ("--no-cache", args.no_cache), ("--prompts", args.prompts))
    if args.assistant is not None or args.prompt_lookup is not None:
        for name, value in others:
            if value:
                raise input_error(name, value, "nothing with --assistant or --prompt-lookup", "Pass one of the two.")
    if args.prompts is None:
        if args.out is not None or args.pages is not None:
            raise input_error("--out, --pages", "a value", "none without --prompts", "One text is printed.")
        return
    for name, value in (("--prompt", args.prompt), ("--image", args.image), *others[:2]):
        if value:
            raise input_error(name, value, "nothing with --prompts", "Pass one of the two.")
    if str(args.prompts) == "-" and args.out is None:
        todo = "The answers are written there, one line each, and a second run continues them."
        raise input_error("--out", "nothing", "a file for the answers, with --prompts -", todo)


def _continue_all(args: argparse.Namespace, texts: Any, sampling: Any) -> int:
    """Answer every prompt of a file, by continuous batching."""
    import dataclasses

    from tqdm import tqdm

    from fastattn.lm.generate.prompts import Results, read_prompts

    prompts = read_prompts(args.prompts)
    out = args.out or args.prompts.with_name(args.prompts.name + ".out.jsonl")
    settings = {**dataclasses.asdict(sampling), "tokens": args.tokens, "stop": args.stop}
    results = Results(out, {**settings, "checkpoint": str(args.checkpoint), "prompts": str(args.prompts)})
    todo = [(index, prompt) for index, prompt in enumerate(prompts) if prompt.id not in results.done]
    longest = texts.model.config.longest
    for _, prompt in todo:
        if (length := texts.length(prompt.text)) > longest:
            what = f"the prompt {prompt.id!r} has {length} tokens, the model's max_length is {longest}"
            raise DataError(f"{args.prompts}: {what}. Shorten it.")
    made = 0
    with results.writing() as add, tqdm(total=len(prompts), initial=len(results.done), unit="prompt") as bar:
        if todo:
            found = texts.complete(
                [prompt.text for _, prompt in todo],
                args.tokens,
                sampling,
                rows=[index for index, _ in todo],
                batch=args.batch,
                page_size=args.page_size or 16,
                num_pages=args.pages,
            )
            for done in found:
                prompt = todo[done.index][1]
                add({"id": prompt.id, "prompt": prompt.text, "text": done.text, "tokens": done.tokens,
                     "reason": done.reason})  # fmt: skip
                made += done.tokens
                bar.set_postfix(tokens=made)
                bar.update()
    print(f"{len(prompts)} texts in {out}")
    return 0
