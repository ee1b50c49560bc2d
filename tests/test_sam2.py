"""The SAM 2 propagator, with small random weights of the `transformers` package: nothing is fetched."""

import shutil
import sys
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))
pytest.importorskip("transformers", reason="pip install -r requirements-sam2.txt")
import differ  # noqa: E402, F401  (lets the package be imported beside a torchvision built for another torch)
from masks import Sam2  # noqa: E402

SIDE = 128


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model as `save_pretrained` leaves it."""
    from transformers import Sam2HieraDetConfig, Sam2VideoConfig, Sam2VideoModel, Sam2VisionConfig

    grids = [[SIDE // n] * 2 for n in (4, 8, 16)]
    backbone = Sam2HieraDetConfig(
        hidden_size=8, num_attention_heads=1, image_size=[SIDE, SIDE], blocks_per_stage=[1, 1, 2, 1], embed_dim_per_stage=[8, 16, 32, 64],
        num_attention_heads_per_stage=[1, 2, 4, 8], window_size_per_stage=[8, 4, 8, 4], global_attention_blocks=[3],
        window_positional_embedding_background_size=[4, 4])
    vision = Sam2VisionConfig(backbone_config=backbone, backbone_channel_list=[64, 32, 16, 8], backbone_feature_sizes=grids,
                              fpn_hidden_size=128)
    config = Sam2VideoConfig(
        vision_config=vision, image_size=SIDE, prompt_encoder_config=dict(hidden_size=128, image_size=SIDE),
        mask_decoder_config=dict(hidden_size=128, mlp_dim=32, num_attention_heads=2, iou_head_hidden_dim=32),
        memory_attention_hidden_size=128, memory_attention_num_layers=1, memory_attention_feed_forward_hidden_size=32,
        memory_attention_rope_feat_sizes=grids[-1], memory_encoder_hidden_size=128, mask_downsampler_embed_dim=128,
        memory_fuser_embed_dim=128, memory_fuser_intermediate_dim=32, memory_fuser_num_layers=1)
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("sam2")
    Sam2VideoModel(config).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def carry(folder):
    return Sam2(folder)


def noise(frames: int = 5, seed: int = 0) -> list[np.ndarray]:
    return list(np.random.default_rng(seed).integers(0, 256, (frames, 60, 90, 3), dtype=np.uint8))


def test_frames_come_in_order_each_with_every_object(carry):
    """From the prompt's frame to the last one asked for, in either direction, as bool masks of the frames' size."""
    frames, points = noise(), {9: (20.0, 30.0), 4: (70.0, 10.0)}
    for start, stop, length in ((0, 4, 5), (4, 0, 5), (3, 1, 3), (1, 2, 2), (2, 2, 1), (0, 0, 1)):
        found = list(carry(frames, start, points, stop))
        assert len(found) == length and all(list(masks) == [9, 4] for masks in found)
        assert all(m.shape == (60, 90) and m.dtype == bool for masks in found for m in masks.values())
    assert list(carry(frames, 0, {}, 4)) == [{}] * 5


def test_each_call_has_a_memory_of_its_own(carry):
    """A backward run gives the same masks before and after an unrelated forward run."""
    frames, points = noise(), {1: (20.0, 30.0)}
    back = [masks[1] for masks in carry(frames, 4, points, 0)]
    list(carry(noise(5, 7), 0, {1: (50.0, 50.0), 2: (5.0, 5.0)}, 4))
    assert np.array_equal(back, [masks[1] for masks in carry(frames, 4, points, 0)])


def test_a_prompt_on_a_late_frame_counts(carry):
    """Two places give two masks, there and, through the memory, in the last frame they are carried to; the first mask is that
    of the frame alone."""
    frames = noise()
    one, two = (list(carry(frames, 3, {1: place}, 0)) for place in ((10.0, 10.0), (80.0, 50.0)))
    assert not np.array_equal(one[0][1], two[0][1]) and not np.array_equal(one[3][1], two[3][1])
    alone = list(carry([frames[3]], 0, {1: (10.0, 10.0)}, 0))
    assert np.array_equal(one[0][1], alone[0][1])


@pytest.mark.parametrize("start, stop", [(0, 3), (3, 0)])
def test_the_masks_are_those_of_the_library(folder, carry, start, stop):
    """Its processors, its session and its own loop over frames, on a model of its own: the same masks but for a few pixels
    on the edge, where the two ways to shrink a frame round differently."""
    pytest.importorskip("torchvision", reason="pip install --no-deps torchvision")
    from transformers import Sam2ImageProcessorFast, Sam2VideoModel, Sam2VideoProcessor, Sam2VideoVideoProcessor

    size = {"height": SIDE, "width": SIDE}
    processor = Sam2VideoProcessor(Sam2ImageProcessorFast(size=size), Sam2VideoVideoProcessor(size=size), target_size=SIDE)
    model, frames, points = Sam2VideoModel.from_pretrained(folder).eval(), noise(4), {5: (20.0, 30.0), 2: (70.0, 10.0)}
    session = processor.init_video_session(video=frames, inference_device="cpu", dtype=torch.float32)
    processor.add_inputs_to_inference_session(session, frame_idx=start, obj_ids=list(points),
                                              input_points=[[[list(place)] for place in points.values()]], input_labels=[[[1], [1]]])
    with torch.inference_mode():
        model(session, frame_idx=start)
        wanted = {out.frame_idx: processor.post_process_masks([out.pred_masks], [[60, 90]], binarize=True)[0][:, 0].numpy()
                  for out in model.propagate_in_video_iterator(session, start_frame_idx=start, reverse=stop < start)}
    numbers = range(start, stop + 1) if stop > start else range(start, stop - 1, -1)
    for number, masks in zip(numbers, carry(frames, start, points, stop), strict=True):
        got = np.stack([masks[5], masks[2]])
        assert wanted[number].any() and (got != wanted[number]).mean() < 0.01


def test_what_is_missing_is_said_in_one_line(folder, tmp_path, monkeypatch):
    """No such folder, a damaged one, one without some of the tensors, no package, a package that does not load."""
    with pytest.raises(ValueError, match="no folder with a SAM 2 model"):
        Sam2(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match="cannot be read as a SAM 2 model") as caught:
        Sam2(tmp_path)
    assert "\n" not in str(caught.value)
    from safetensors.torch import load_file, save_file
    shutil.copytree(folder, tmp_path / "half")
    tensors = load_file(tmp_path / "half/model.safetensors")
    save_file({name: tensor for name, tensor in tensors.items() if not name.startswith("memory_")}, tmp_path / "half/model.safetensors",
              metadata={"format": "pt"})
    with pytest.raises(ValueError, match="no SAM 2 for videos, [0-9]+ tensors are missing, memory_"):
        Sam2(tmp_path / "half")
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ValueError, match="pip install -r requirements-sam2.txt"):
        Sam2(tmp_path)
    broken = ModuleType("transformers")
    broken.__spec__ = ModuleSpec("transformers", None)
    monkeypatch.setitem(sys.modules, "transformers", broken)
    with pytest.raises(ValueError, match="transformers cannot be loaded"):
        Sam2(tmp_path)
