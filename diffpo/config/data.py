"""The section `data:` of a config: what is trained on, how it is read and how it is prepared."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, field_validator

from .section import Section

# where the data are, which may change: a checkpoint keeps a hash of their content
PLACES = ("train", "validation", "prompts", "train_split", "validation_split", "roots")


class Columns(Section):
    """Names of the columns. null looks for the usual names, which docs/data.md lists."""

    caption: str | None = None
    """The caption or prompt of a row."""

    chosen: str | None = None
    """The better image of a pair."""

    rejected: str | None = None
    """The worse image of a pair."""

    image_0: str | None = None
    """The first image of a labelled pair."""

    image_1: str | None = None
    """The second image of a labelled pair."""

    label_0: str | None = None
    """The probability, 0 to 1, that the first image is the better one."""

    label_1: str | None = None
    """The probability, 0 to 1, that the second image is the better one."""

    has_label: str | None = None
    """Whether the row was judged. Rows where it is false or null are left out."""

    score_0: str | None = None
    """The score of image_0 (or chosen). Needed by links that use the score gap, and by data.curriculum."""

    score_1: str | None = None
    """The score of image_1 (or rejected)."""

    caption_chosen: str | None = None
    """The caption of the better image, where each image of a pair has its own (DCPO)."""

    caption_rejected: str | None = None
    """The caption of the worse image, where each image of a pair has its own (DCPO)."""

    caption_0: str | None = None
    """The caption of image_0 (or chosen), where each image of a pair has its own; labels may be any (DCPO)."""

    caption_1: str | None = None
    """The caption of image_1 (or rejected)."""

    image: str | None = None
    """A single image with a like or a dislike."""

    liked: str | None = None
    """Whether the single image is liked: 1 or true, 0 or false."""

    images: str | None = None
    """The images of a ranked list."""

    scores: str | None = None
    """The scores of a ranked list; higher is better."""

    ranks: str | None = None
    """The ranks of a ranked list; 1 is best."""

    mask: str | None = None
    """An image of the size of the row's images, whose white parts the preference is about: errors are weighted by it.
    There is no usual name, so null reads no column."""

    source: str | None = None
    """A picture that the row's images are edits of, in their size; the caption is the instruction. For models that edit
    (docs/models.md). Of those that take several it may be a list, with pictures of any size. Also of the table
    `prompts` and of `log.samples.prompts`, with what each prompt is about. There is no usual name, so null reads no
    column."""

    t_low: str | None = None
    """The lowest timestep that the preference is about; with t_high, for labels of single steps. null: 0."""

    t_high: str | None = None
    """The highest timestep that the preference is about. null: the model's highest."""

    rewards: list[str] = Field(default_factory=list)
    """Several scores of both images of a pair, for objective.steered: NAME stands for the columns NAME_0 and NAME_1."""

    user: str | None = None
    """The user who judged; needed by objective.users. There is no usual name, so null reads no column."""


class Data(Section):
    """Pairs, ranked lists or single images from files, folders or the hub (docs/data.md). Objectives that sample their
    own images take prompts instead."""

    train: str | None = None
    """A file, a folder or a hub id with the rows to train on. null: for objectives that sample from prompts."""

    validation: str | None = None
    """Pairs that are not trained on, whose accuracy is measured every train.eval_every updates. null: not measured."""

    prompts: str | None = None
    """Prompts that on-policy objectives sample for: a text file with one prompt per line, or any other source that
    `diffpo generate --prompts` takes. null: for objectives that train on data."""

    train_split: str = "train"
    """The split of `train`, where a hub id or a folder holds several."""

    validation_split: str = "validation"
    """The split of `validation`, where a hub id or a folder holds several."""

    roots: list[str] = Field(default_factory=list)
    """Further folders whose files rows may name. Without any, rows may name files of the data's own folder only."""

    columns: Columns = Columns()
    """Names of the columns, where they are not the usual ones."""

    limit: int | None = Field(None, gt=0)
    """Read only this many rows of each source, from its start. null: all."""

    streaming: bool = False
    """Copy only the needed rows and columns of a hub id or of parquet files, into `cache` (docs/data.md)."""

    resolution: int = Field(gt=0, multiple_of=8)
    """Side of the training images in pixels (with buckets the root of their area): 512 for SD1.5, 1024 for SDXL."""

    background: str = "white"
    """Colour behind transparent pixels, by name or as #rrggbb."""

    buckets: bool = False
    """Keep aspect ratios: images are cropped to the nearest of several sizes with about resolution^2 pixels. Needed
    where the images of a pair have different sizes."""

    crop: Literal["center", "random"] = "center"
    """Which part of an image is kept. random: another part in each epoch, so latents are not cached."""

    flip: bool = False
    """Mirror the images of a row at random, together. Latents are then not cached."""

    caption_dropout: float = Field(0.0, ge=0, lt=1)
    """Share of the captions replaced by the empty one, so that classifier-free guidance keeps working."""

    ties: Literal["drop", "soft"] = "drop"
    """drop: labels are 0 or 1, and ties are left out. soft: labels are used as probabilities, and ties are kept."""

    bad_rows: Literal["error", "skip"] = "error"
    """error: a row that cannot be used stops the run before training. skip: it is left out and counted."""

    list_size: int = Field(4, gt=1)
    """Images of a ranked list in an update (links of lists)."""

    curriculum: int = Field(1, gt=0)
    """Number of parts into which the pairs are sorted by score gap, easiest first. 1: all pairs from the start."""

    curriculum_updates: int = Field(500, gt=0)
    """Updates until the next part is added (curriculum above 1)."""

    curriculum_keeps: bool = True
    """Parts stay when the next one is added (Curriculum-DPO). false: each stage has its own part alone (Curry-DPO)."""

    cache: str = Field("~/.cache/diffpo", validate_default=True)
    """Folder for latents and text embeddings, shared by all runs. Machines of one run must share it."""

    cache_latents: bool = True
    """Encode the images once before training. false: keep the VAE and encode in each step."""

    @field_validator("background", mode="after")
    @classmethod
    def _colour(cls, background: str) -> str:
        from PIL import ImageColor

        if len(ImageColor.getrgb(background)) != 3:
            raise ValueError("expected an opaque colour, e.g. white or #808080")
        return background
