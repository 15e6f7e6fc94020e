"""distill convert: a pretrained language model of another format as a Hugging Face folder.

  distill convert source=$RESEARCH_DATA_DIR/lm/stories260K output=outputs/stories260K
  distill convert FOLDER format=llama2c output=outputs/model

llama2c: a folder with one *.bin checkpoint of llama2.c and its tok*.bin. The folder written holds weights, config and
tokenizer: `AutoModelForCausalLM` and `AutoTokenizer` of transformers load it, and so do `model@student=pretrained_lm
student.path=...` and `teacher=frozen teacher.path=...`.
"""

from pathlib import Path

from omegaconf import DictConfig

GROUPS = ()


def task(cfg: DictConfig) -> None:
    """Write one folder, which must not hold a model already."""
    from hydra.core.hydra_config import HydraConfig

    from research.errors import ConfigError
    from research.models.llama2c import convert_llama2c

    if not cfg.source or not Path(cfg.source).is_dir():
        raise ConfigError(f"source is {cfg.source!r}; give the folder of a checkpoint and its tokenizer")
    output = Path(cfg.output or Path(HydraConfig.get().runtime.output_dir, "model"))
    if (output / "config.json").exists():
        raise ConfigError(f"output is {output}, which holds a model already; choose another folder, or delete it")
    parameters = convert_llama2c(Path(cfg.source), output)
    print(f"{parameters:,} parameters and the tokenizer in {output}")
