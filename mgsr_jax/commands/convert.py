"""`mgsr convert`: pickled weights to safetensors."""

from mgsr_jax.commands.exit_status import DONE


def convert(source: str, output: str) -> int:
    """Rewrite pickled weights (.bin) as safetensors; needs the convert extra.

    Args:
      source: folder with pytorch_model.bin, in one file or in several shards, or the
        hub name of such a model (org/name, or org/name@revision).
      output: folder to create; must be new.
    """
    from mgsr_jax.checkpoint.convert import convert
    from mgsr_jax.checkpoint.hub import PICKLES, local_folder

    convert(local_folder(source, weights=PICKLES), output)
    print(output)
    return DONE
