"""Upload a photo, see its overlay: onnxruntime, numpy and pillow behind Python's own web server.

python web_server.py BUNDLE [PORT]     then http://localhost:8000, or
curl --data-binary @photo.jpg http://localhost:8000 > overlay.png

The bundle takes any size (--size=dynamic) of uint8 images and answers with ids. For one machine and
one user: it has no encryption, no accounts and no queue.
"""

import http.server
import io
import json
import pathlib
import sys

import numpy as np
import onnxruntime
from PIL import Image, ImageOps

MAX_BYTES, MAX_PIXELS, MIN_SIDE = 20_000_000, 8_000_000, 32
PAGE = b"""<!doctype html><title>Segmentation</title><input type=file accept=image/*>
<p id=say></p><img id=out style="max-width:100%"><script>
const say = text => document.getElementById("say").textContent = text
document.querySelector("input").onchange = async event => {
  const [file] = event.target.files
  if (file.size > 20e6) return say("20,000,000 bytes at most")
  const answer = await fetch("/", {method: "POST", body: file})
  if (answer.ok) document.getElementById("out").src = URL.createObjectURL(await answer.blob())
  say(answer.ok ? "" : await answer.text())
}</script>"""


def overlay(data: bytes, model: onnxruntime.InferenceSession, palette: np.ndarray) -> bytes:
    """PNG of an encoded photo, half tinted by class. Raises ValueError for what is no photo."""
    try:
        with Image.open(io.BytesIO(data)) as photo:
            if photo.width * photo.height > MAX_PIXELS or min(photo.size) < MIN_SIDE:
                raise ValueError(f"{photo.width}x{photo.height}: {MAX_PIXELS:,} pixels at most, "
                                 f"sides from {MIN_SIDE} on")  # fmt: skip
            image = np.asarray(ImageOps.exif_transpose(photo).convert("RGB"))
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise ValueError(f"not a readable image: {error}") from error
    (ids,) = model.run(None, {"image": image[None]})
    picture, mixed = io.BytesIO(), (image // 2 + palette[ids[0]] // 2).astype(np.uint8)
    Image.fromarray(mixed).save(picture, "png")
    return picture.getvalue()


class Handler(http.server.BaseHTTPRequestHandler):
    model, palette, timeout = None, None, 30  # seconds that an upload may stand still

    def do_GET(self):
        self.answer(200, "text/html; charset=utf-8", PAGE)

    def do_POST(self):
        length = self.headers.get("Content-Length", "")
        if not length.isdigit() or int(length) > MAX_BYTES:
            self.close_connection = True  # the body is not read
            return self.answer(413, "text/plain", f"{MAX_BYTES:,} bytes at most".encode())
        try:
            picture = overlay(self.rfile.read(int(length)), self.model, self.palette)
        except ValueError as error:
            return self.answer(400, "text/plain; charset=utf-8", str(error).encode())
        self.answer(200, "image/png", picture)

    def answer(self, status: int, kind: str, body: bytes):
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


def main(bundle: str, port: str = "8000") -> None:
    folder = pathlib.Path(bundle)
    for name in ("bundle.json", "model.onnx"):
        if not (folder / name).is_file():
            sys.exit(f"{bundle}: {name} is missing; give a bundle that holds it")
    manifest = json.loads((folder / "bundle.json").read_text())
    kinds = manifest["input"]["height"], manifest["input"]["dtype"], manifest["output"]["name"]
    if kinds != ("any", "uint8", "ids"):
        wanted = "--size=dynamic --input=uint8 --output_kind=ids"
        sys.exit(f"{bundle}: {', '.join(map(str, kinds))}; export it with {wanted}")
    Handler.model = onnxruntime.InferenceSession(folder / "model.onnx")
    Handler.palette = np.array(manifest["labels"]["palette"], np.uint8)
    server = http.server.ThreadingHTTPServer(("localhost", int(port)), Handler)
    print(f"http://localhost:{server.server_port}", flush=True)
    server.serve_forever()


if __name__ == "__main__":
    if len(sys.argv) not in (2, 3):
        sys.exit(__doc__)
    main(*sys.argv[1:])
