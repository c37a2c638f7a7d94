"""Prepares text for training: packed ArrayRecord shards and a manifest.

python -m scripts.prepare_data --output=data/novels --tokenizer=bytes \
  --length=1024 --align=64 --holdout=0.01,0.01 'books/*.txt'

Inputs: .txt (a document each), .jsonl, .jsonl.gz, .parquet, folders of these,
patterns, or tfds:name:split; local or in an object store (gs://).  The same
command continues an interrupted preparation; its result does not depend on
--workers.  Then: --config.data.kind=records --config.data.path=data/novels.
"""

from absl import flags

from hope_jax import cli
from hope_jax.config import ConfigError
from hope_jax.data import prepare


def define_flags() -> None:
  defaults = prepare.Options()
  flags.DEFINE_string("output", None, "folder of the result", required=True)
  flags.DEFINE_string(
    "tokenizer",
    "bytes",
    "bytes, a tokenizer's file, or sentencepiece:32000 (trained here)",
  )
  flags.DEFINE_integer("length", defaults.length, "tokens of an example")
  flags.DEFINE_integer(
    "align", defaults.align, "documents begin at multiples of it"
  )
  flags.DEFINE_string("split", defaults.split, "where all documents go")
  flags.DEFINE_list("holdout", [], "or shares of valid and test: 0.01,0.01")
  flags.DEFINE_integer(
    "long", defaults.long, "tokens of a long document: a group of their own"
  )
  flags.DEFINE_string("text_field", defaults.text_field, "field with the text")
  flags.DEFINE_string(
    "prompt_field", None, "field that is read but not learned (fine-tuning)"
  )
  flags.DEFINE_integer("part_bytes", defaults.part_bytes, "bytes of a part")
  flags.DEFINE_integer("parts", defaults.parts, "the first parts only; 0: all")
  flags.DEFINE_integer("seed", defaults.seed, "of the documents' order")
  flags.DEFINE_string("licence", "", "noted in the manifest")
  flags.DEFINE_integer("workers", 0, "processes; 0: one per core")


def main(inputs: list[str]) -> None:
  import tqdm

  args = flags.FLAGS
  if not inputs:
    raise ConfigError("no inputs: name files, folders or patterns")
  try:
    holdout = tuple(float(share) for share in args.holdout)
  except ValueError as error:
    raise ConfigError(f"--holdout: {error}") from error
  options = prepare.Options(
    length=args.length,
    align=args.align,
    split=args.split,
    holdout=holdout,
    long=args.long,
    text_field=args.text_field,
    prompt_field=args.prompt_field,
    part_bytes=args.part_bytes,
    parts=args.parts,
    seed=args.seed,
  )
  with tqdm.tqdm(unit="B", unit_scale=True, disable=None) as bar:

    def progress(count: int, total: int, done: int) -> None:
      bar.set_description(f"{count} of {total} parts")
      bar.update(done - bar.n)

    manifests = prepare.prepare(
      inputs,
      args.output,
      args.tokenizer,
      options,
      licence=args.licence,
      workers=args.workers,
      progress=progress,
    )
  for split, manifest in manifests.items():
    counts = manifest.counts
    print(
      f"{split}: {counts['documents']:,} documents, {counts['tokens']:,} tokens"
      f" in {counts['examples']:,} examples of {manifest.length:,}"
      f" ({100 * (1 - counts['tokens'] / counts['places']):.1f} % without"
      " weight)"
    )


if __name__ == "__main__":
  define_flags()
  cli.run(main, takes_arguments=True)
