"""A CLIP of random weights and a head for its embeddings, as torch libraries write them."""

import hashlib
import pathlib
import shutil

import torch
import transformers

TOKENIZER = pathlib.Path(__file__).parent / "golden" / "tiny-sd" / "tokenizer"
PROJECTION = 24
TEXT = dict(vocab_size=530, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
            num_attention_heads=4, bos_token_id=528, eos_token_id=529, pad_token_id=529)
# Resizes by Pillow. Where torchvision is installed, CLIPImageProcessor rounds as that does.
ImageProcessor = getattr(transformers, "CLIPImageProcessorPil", transformers.CLIPImageProcessor)
VISION = dict(hidden_size=48, intermediate_size=96, num_hidden_layers=2,
              num_attention_heads=3, image_size=32, patch_size=8)


def save_clip(folder):
  """Writes a seeded CLIP with tokenizer and image processor; returns the folder."""
  torch.manual_seed(0)
  config = transformers.CLIPConfig(text_config=TEXT, vision_config=VISION,
                                   projection_dim=PROJECTION)
  model = transformers.CLIPModel(config)
  with torch.no_grad():  # large enough that each image and prompt has a score of its own
    for parameter in model.parameters():
      if parameter.ndim > 1:
        parameter *= 4
  model.save_pretrained(folder)
  ImageProcessor(
      size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}
      ).save_pretrained(folder)
  for path in TOKENIZER.iterdir():
    shutil.copy(path, folder)
  return folder


def make_head(path, widths=(PROJECTION, 16, 8, 1)):
  """A seeded head as torch writes it: the keyword arguments that name it, and itself."""
  torch.manual_seed(1)
  layers = [layer for pair in zip(widths[:-1], widths[1:])
            for layer in (torch.nn.Linear(*pair), torch.nn.Dropout(0.2))]
  head = torch.nn.ModuleDict({"layers": torch.nn.Sequential(*layers[:-1])})
  torch.save(head.state_dict(), path)
  digest = hashlib.sha256(path.read_bytes()).hexdigest()
  return dict(head=str(path), head_sha256=digest), head["layers"].eval()
