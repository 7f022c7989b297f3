"""transformers' torch CLIPVisionModel on the CPU: images to features, and JPEG files to accuracy."""

import io
import itertools
from pathlib import Path
from typing import Any

import numpy as np
import torch  # pyright: ignore[reportMissingImports]
from transformers import CLIPVisionConfig, CLIPVisionModel
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from benchmarks.common import measure
from nufilt_jax.evaluation.data_sets import open_data_set
from nufilt_jax.evaluation.prefetch import computed_ahead


class Model:
    """A vision tower with given weights, on as many threads as there are cores."""

    def __init__(self, config: dict[str, Any], params: dict[str, np.ndarray]) -> None:
        torch.set_num_threads(measure.cores())
        self._model: Any = CLIPVisionModel(CLIPVisionConfig(**config)).eval()
        names = {name.removeprefix("vision_model."): name for name in self._model.state_dict()}  # 5 drops the prefix
        state = {names[name.removeprefix("vision_model.")]: torch.from_numpy(x) for name, x in params.items()}
        missing, _ = self._model.load_state_dict(state, strict=False)
        assert all(name.endswith("position_ids") for name in missing), missing

    def features(self, pixels: np.ndarray, batch: int) -> np.ndarray:
        """Of all images, in batches."""
        parts = (pixels[start : start + batch] for start in range(0, len(pixels), batch))
        return np.concatenate([self._features(part) for part in parts])

    def accuracy(self, folder: Path, head: np.ndarray, batch: int) -> float:
        """On a data set's files."""
        import datasets
        from PIL import Image

        rows = open_data_set(str(folder), split="test", where="JPEG", offline=True).rows()
        rows = rows.cast_column("image", datasets.Image(decode=False))
        processor: Any = CLIPImageProcessorPil()

        def prepared(row: int) -> np.ndarray:
            image = Image.open(io.BytesIO(rows[row]["image"]["bytes"]))
            return processor(images=image, return_tensors="np")["pixel_values"][0]

        images = computed_ahead(prepared, range(len(rows)), threads=measure.cores(), ahead=2 * batch)
        best: list[np.ndarray] = []
        while part := list(itertools.islice(images, batch)):
            # The length of the features does not move the best class.
            best.append(np.argmax(self._features(np.stack(part)) @ head.T, axis=1))
        return float(np.mean(np.concatenate(best) == np.array([*rows["label"]])))

    def _features(self, pixels: np.ndarray) -> np.ndarray:
        with torch.inference_mode():
            return self._model(pixel_values=torch.from_numpy(pixels)).pooler_output.numpy()
