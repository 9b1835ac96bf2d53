"""`mgsr convert`: pickled weights to safetensors."""

from mgsr_jax.commands.exit_status import DONE


def convert(source: str, output: str) -> int:
    """Rewrite pickled weights (.bin) as safetensors; needs the convert extra.

    Args:
      source: folder with pytorch_model.bin, in one file or in several shards.
      output: folder to create; must be new.
    """
    from mgsr_jax.checkpoint.convert import convert

    convert(source, output)
    print(output)
    return DONE
