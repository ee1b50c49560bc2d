"""Two models, layer by layer: which is the first layer that disagrees?

    python tests/differ.py                  # a random Molmo2 of the `transformers` library, loaded here
    python tests/differ.py --break          # the same with the bidirectional rule switched off

`trace` runs one model and keeps what every layer gave; `compare` lines the two up.
"""

import os
import sys
import tempfile
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import attention  # noqa: E402
import command  # noqa: E402
import data  # noqa: E402
import weights  # noqa: E402
from attention import MaskIds  # noqa: E402
from model import Batch, Molmo  # noqa: E402
from packing import collate  # noqa: E402
from tokenizer import Tokenizer  # noqa: E402

TOKENIZER = Tokenizer.load(Path(__file__).resolve().parent.parent / "assets/tokenizer.json")
SIZES = dict(crop=126, patch=14, vit=(32, 5, 4, 64), taps=(4, 2), pool=4, mlp=48, width=48, layers=4, heads=4, kv_heads=2, head=12,
             hidden=96)


def declare_operators() -> torch.library.Library | None:
    """The transformers library imports torchvision if it is there, which describes two operators of its compiled half;
    where that half does not fit this torch they are declared here, and the Python half is enough. Keep what is returned."""
    try:
        import torchvision  # noqa: F401
    except ImportError:
        return None
    except RuntimeError:
        library = torch.library.Library("torchvision", "DEF")
        for name in ("nms", "qnms"):
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
            del sys.modules[name]
        return library
    return None


OPERATORS = declare_operators()


def reference(style: str = "qwen3", tied: bool = False, seed: int = 0, sizes: dict = SIZES):
    """A small random Molmo2 of the `transformers` library. style: "qwen3" or "olmo" (post-norm, YaRN on two layers)."""
    from transformers import Molmo2Config, Molmo2ForConditionalGeneration

    s = sizes
    v, layers, heads, hidden = s["vit"]
    rope = {"rope_type": "default", "rope_theta": 1e4}
    text = {}
    if style == "olmo":
        rope = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 8.0, "attention_factor": 1.2079441541679836,
                "beta_fast": 32.0, "beta_slow": 1.0, "original_max_position_embeddings": 64}
        text = {"norm_after": True, "qk_norm_type": "olmo", "rope_scaling_layers": [1, 3]}
    base = TOKENIZER.base_size
    config = Molmo2Config(
        vision_config=dict(hidden_size=v, num_hidden_layers=layers, num_attention_heads=heads, num_key_value_heads=heads,
                           head_dim=v // heads, intermediate_size=hidden, image_size=[s["crop"], s["crop"]],
                           patch_size=s["patch"]),
        adapter_config=dict(vision_feature_layer=list(s["taps"]), hidden_size=v, num_attention_heads=s["pool"],
                            num_key_value_heads=s["pool"], head_dim=v // s["pool"], intermediate_size=s["mlp"],
                            text_hidden_size=s["width"]),
        text_config=dict(hidden_size=s["width"], num_hidden_layers=s["layers"], num_attention_heads=s["heads"],
                         num_key_value_heads=s["heads"] if style == "olmo" else s["kv_heads"], head_dim=s["head"],
                         vocab_size=base, additional_vocab_size=128, intermediate_size=s["hidden"], max_position_embeddings=4096,
                         rope_parameters=rope, **text),
        image_start_token_id=base, image_end_token_id=base + 1, image_patch_id=base + 2,
        low_res_image_start_token_id=base + 4, frame_start_token_id=base + 7, frame_end_token_id=base + 8)
    torch.manual_seed(seed)
    made = Molmo2ForConditionalGeneration(config).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():  # the library starts norms at 1 and biases at 0, which would hide mistakes
        for name, p in made.named_parameters():
            p.normal_(1.0 if "norm" in name and name.endswith("weight") else 0.0, 0.2, generator=generator)
        if tied:
            made.lm_head.weight.copy_(made.get_input_embeddings().weight[:base])
    return made


def save_reference(made, folder: Path, tied: bool = False) -> None:
    """As the library writes it, with a tokenizer beside it."""
    made.save_pretrained(folder)
    TOKENIZER.save(folder / "tokenizer.json")
    (folder / "preprocessor_config.json").write_text('{"max_crops": 4, "overlap_margins": [1, 1], "pooling_size": [2, 2]}')


def reference_inputs(molmo: Molmo, batch: Batch, grids: list[list[int]], video: bool) -> dict:
    """Our batch (padded on the right, an example a row) in the library's words. grids: per picture or clip."""
    pixels = (batch.crops.float() / 255 - 0.5) / 0.5
    names = ("pixel_values_videos", "video_token_pooling", "video_grids") if video else (
        "pixel_values", "image_token_pooling", "image_grids")
    pictures = dict(zip(names, (pixels, batch.pooling, torch.tensor(grids)))) if len(pixels) else {}
    return {"input_ids": batch.tokens, "attention_mask": (batch.example_ids >= 0).long(), "position_ids": batch.positions,
            "mm_token_type_ids": molmo.is_visual(batch.tokens).long(), **pictures}


def grids(views, molmo: Molmo) -> list[list[int]]:
    """Rows and columns of visual tokens, counted in the layout."""
    if views.times is not None:
        side = -(-molmo.config.views.grid // molmo.config.views.video_pool)
        return [[len(views.times), side, side]]
    side, found = -(-molmo.config.views.grid // molmo.config.views.image_pool), []
    for start in (i for i, piece in enumerate(views.layout) if piece == "<im_start>"):
        block = views.layout[start:views.layout.index("<im_end>", start)]
        found.append([side, side, block.count("<im_col>"), block.index("<im_col>") - 1])
    return found


@contextmanager
def recorded(modules: dict[str, torch.nn.Module]):
    """name -> output of every module that runs inside."""
    kept = {}
    def keep(name):
        def hook(module, inputs, output):
            kept[name] = (output[0] if isinstance(output, tuple) else output).detach()
        return hook
    hooks = [module.register_forward_hook(keep(name)) for name, module in modules.items()]
    try:
        yield kept
    finally:
        for hook in hooks:
            hook.remove()


def layers(ours: Molmo, theirs) -> list[tuple[str, torch.nn.Module, torch.nn.Module]]:
    """Modules that must give the same, in the order in which they run."""
    inner = theirs.model
    return ([("patch embedding", ours.vit.patch_embedding, inner.vision_tower.patch_embedding)]
            + [(f"vit block {i}", a, b) for i, (a, b) in enumerate(zip(ours.vit.blocks, inner.vision_tower.layers))]
            + [("projector", ours.connector.image_projector, inner.multi_modal_projector.image_projector)]
            + [(f"block {i}", a, b) for i, (a, b) in enumerate(zip(ours.blocks, inner.language_model.layers))]
            + [("final norm", ours.ln_f, inner.language_model.norm)])


@torch.no_grad()
def compare(ours: Molmo, theirs, batch: Batch, inputs: dict) -> list[tuple[str, float]]:
    """Layer -> largest difference as a share of the largest number; padding is left out."""
    pairs = layers(ours, theirs)
    with recorded({name: a for name, a, _ in pairs}) as left, recorded({name: b for name, _, b in pairs}) as right:
        ours_logits = ours.logits(ours(batch)[0])
        theirs_logits = theirs(**inputs).logits
    rows, found = [(name, left[name], right[name]) for name, *_ in pairs if name in left and name in right], []
    for name, a, b in [*rows, ("logits", ours_logits, theirs_logits)]:
        if a.shape[:2] == batch.tokens.shape:
            a, b = a[batch.example_ids >= 0], b[batch.example_ids >= 0]
        found.append((name, float((a.reshape(b.shape) - b).abs().max() / b.abs().max()) if b.numel() else 0.0))
    return found


def first_difference(found: list[tuple[str, float]], tolerance: float = 1e-4) -> str | None:
    return next((name for name, difference in found if not difference <= tolerance), None)


def causal_only(q: MaskIds, k: MaskIds) -> torch.Tensor:
    """The mask rule without its bidirectional half: a mistake to be found."""
    return (q.example[:, :, None] == k.example[:, None]) & (k.index[:, None] <= q.index[:, :, None])


def main() -> None:
    parser = command.Parser(prog="differ.py", description=__doc__.split("\n")[0])
    parser.add_argument("--break", dest="broken", action="store_true", help="switch the bidirectional rule off here")
    args = parser.parse_args()
    if find_spec("transformers") is None:
        raise ValueError("this compares with the transformers library: pip install -r requirements-dev.txt")
    theirs = reference()
    with tempfile.TemporaryDirectory() as folder:
        save_reference(theirs, Path(folder))
        ours, tokenizer = weights.load(folder)
    if args.broken:
        attention.may_attend = causal_only
    views = data.views_of(data.draw("stills", 0, 1, 1), ours.config.views)
    batch = collate([data.prompt(tokenizer, views, "point to the cups")])
    found = compare(ours, theirs, batch, reference_inputs(ours, batch, grids(views, ours), False))
    for name, difference in found:
        print(f"{name:20}{difference:.1e}")
    print("first layer that disagrees:", first_difference(found) or "none")


if __name__ == "__main__":
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    with command.one_line("differ.py"):
        main()
