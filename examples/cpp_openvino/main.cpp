// The mask of an image by a bundle's ONNX model in OpenVINO:
//
//   segment BUNDLE/model.onnx IMAGE.ppm MASK.pgm
//
// Images are binary PPM (P6), masks binary PGM (P5) whose values are the classes' indices; any tool
// converts them, as in `convert photo.jpg -depth 8 photo.ppm`. The model takes uint8 images and
// answers with ids, as `python -m duc_dlc_jax.export` writes by default.

#include <cctype>
#include <cstdint>
#include <exception>
#include <fstream>
#include <iostream>
#include <stdexcept>
#include <string>
#include <vector>

#include <openvino/openvino.hpp>

namespace {

constexpr std::uint64_t kMaxPixels = 50'000'000;
constexpr std::uint64_t kMinSide = 32;  // of bundle.json's input.min_side

struct Image {
  std::size_t width = 0;
  std::size_t height = 0;
  std::vector<std::uint8_t> pixels;  // RGB, row by row
};

// A number of a PPM's header; comments, from # to the end of the line, may stand before it.
std::uint64_t header_number(std::istream& in) {
  in >> std::ws;
  while (in.peek() == '#') {
    std::string comment;
    std::getline(in, comment);
    in >> std::ws;
  }
  std::string digits;
  while (std::isdigit(in.peek()) && digits.size() < 10) {
    digits.push_back(static_cast<char>(in.get()));
  }
  if (digits.empty() || std::isdigit(in.peek())) {
    throw std::runtime_error("its header is not that of a PPM");
  }
  return std::stoull(digits);
}

Image read_ppm(const std::string& path) {
  std::ifstream in(path, std::ios::binary);
  if (!in) {
    throw std::runtime_error("no such file");
  }
  char magic[2] = {};
  in.read(magic, 2);
  if (!in || magic[0] != 'P' || magic[1] != '6') {
    throw std::runtime_error("not a binary PPM (P6)");
  }
  const std::uint64_t width = header_number(in);
  const std::uint64_t height = header_number(in);
  const std::uint64_t most = header_number(in);
  const std::string size = std::to_string(width) + "x" + std::to_string(height);
  if (most != 255) {
    throw std::runtime_error("values up to " + std::to_string(most) + "; they must be 8 bits wide");
  }
  if (width < kMinSide || height < kMinSide) {
    throw std::runtime_error(size + "; sides must have at least " + std::to_string(kMinSide) +
                             " pixels");
  }
  if (width > kMaxPixels / height) {
    throw std::runtime_error(size + ", more than " + std::to_string(kMaxPixels) + " pixels");
  }
  in.get();  // the one blank before the pixels
  Image image;
  image.width = width;
  image.height = height;
  image.pixels.resize(3 * width * height);
  in.read(reinterpret_cast<char*>(image.pixels.data()),
          static_cast<std::streamsize>(image.pixels.size()));
  if (static_cast<std::size_t>(in.gcount()) != image.pixels.size()) {
    throw std::runtime_error("truncated: " + std::to_string(in.gcount()) + " of " +
                             std::to_string(image.pixels.size()) + " bytes of pixels");
  }
  return image;
}

void write_pgm(const std::string& path, const Image& image, const std::uint8_t* ids) {
  std::ofstream out(path, std::ios::binary);
  out << "P5\n" << image.width << " " << image.height << "\n255\n";
  out.write(reinterpret_cast<const char*>(ids),
            static_cast<std::streamsize>(image.width * image.height));
  out.flush();
  if (!out) {
    throw std::runtime_error("could not be written");
  }
}

ov::CompiledModel load(const std::string& path) {
  ov::Core core;
  const auto model = core.read_model(path);
  if (model->inputs().size() != 1 || model->input().get_element_type() != ov::element::u8 ||
      model->outputs().size() != 1 || model->output().get_element_type() != ov::element::u8) {
    throw std::runtime_error(
        "not a model of uint8 images and ids; export with --input=uint8 --output_kind=ids");
  }
  // Without the hint OpenVINO computes in bfloat16 where the processor has it.
  return core.compile_model(model, "CPU", ov::hint::inference_precision(ov::element::f32));
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 4) {
    std::cerr << "usage: segment MODEL.onnx IMAGE.ppm MASK.pgm\n";
    return 2;
  }
  std::string at = argv[2];  // what an error is about
  try {
    Image image = read_ppm(at);
    at = argv[1];
    auto request = load(at).create_infer_request();
    const ov::Shape shape = {1, image.height, image.width, 3};
    request.set_input_tensor(ov::Tensor(ov::element::u8, shape, image.pixels.data()));
    request.infer();
    const ov::Tensor ids = request.get_output_tensor();
    at = argv[3];
    write_pgm(at, image, ids.data<const std::uint8_t>());
    std::cout << at << ": " << image.width << "x" << image.height << "\n";
  } catch (const std::exception& error) {
    std::cerr << at << ": " << error.what() << "\n";
    return 1;
  }
  return 0;
}
