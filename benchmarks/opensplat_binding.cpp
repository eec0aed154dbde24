// Python binding of OpenSplat's CPU rasterizer, compiled by rasterize.py against a checkout that the user has.
#include <memory>
#include <tuple>
#include <vector>

#include <torch/extension.h>

#include "rasterizer/gsplat-cpu/bindings.h"

using torch::Tensor;

// What the forward pass leaves for the backward pass: for every pixel the Gaussians that it shows.
struct Lists {
    std::unique_ptr<std::vector<int32_t>[]> pixels;
};

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
    pybind11::class_<Lists>(m, "Lists");
    // Explicit lambdas, because the functions take non-const references, which pybind11 cannot bind to temporaries.
    m.def("project", [](Tensor means, Tensor scales, Tensor quats, Tensor viewmat, Tensor clip, float fx, float fy,
                        float cx, float cy, int height, int width) {
        return project_gaussians_forward_tensor_cpu(means.size(0), means, scales, 1.0f, quats, viewmat, clip, fx, fy,
                                                    cx, cy, height, width, 0.01f);
    });
    m.def("forward", [](int width, int height, Tensor xys, Tensor conics, Tensor colors, Tensor opacities,
                        Tensor background, Tensor covariances, Tensor depths) {
        auto [image, transmittance, lists] = rasterize_forward_tensor_cpu(
            width, height, xys, conics, colors, opacities, background, covariances, depths);
        return std::make_tuple(image, transmittance, Lists{std::unique_ptr<std::vector<int32_t>[]>(lists)});
    });
    m.def("backward", [](int width, int height, Tensor xys, Tensor conics, Tensor colors, Tensor opacities,
                         Tensor background, Tensor covariances, Tensor depths, Tensor transmittance,
                         const Lists &lists, Tensor gImage, Tensor gAlpha) {
        return rasterize_backward_tensor_cpu(height, width, xys, conics, colors, opacities, background, covariances,
                                             depths, transmittance, lists.pixels.get(), gImage, gAlpha);
    });
}
