"""Quantizes linears of a whole module in place: the slow reference for searches that replay a module in pieces."""

from __future__ import annotations

import numpy as np
import torch

from qvlm_export.calibrate.blockwise.blocks import get_linear
from qvlm_export.calibrate.quantization.fake_quantized import fake_quantize_inputs
from qvlm_export.calibrate.quantization.quantizer import activation_scale, round_to_codes, weight_scale
from qvlm_export.calibrate.qvlm.joint_search import record_linear_outputs


def quantized_output(module, batches, run, *, layers, chosen, last):
    """Outputs of the linears `last` if `layers` have the clipping ranges `chosen`.

    The weights are rounded in the module and its inputs are fake-quantized; the weights are restored afterwards.
    """
    weights, quantizers = {}, {}
    for layer, clips in zip(layers, chosen, strict=True):
        for name, scheme in layer.schemes.items():
            linear = get_linear(module, name)
            weights[name] = linear.weight.clone()
            rows = linear.weight.reshape(linear.out_features, -1, scheme.group_size or linear.in_features)
            amax = torch.from_numpy(np.quantile(rows.abs(), clips.weight.percentile, axis=2, method="inverted_cdf"))
            scale = weight_scale(amax if scheme.group_size else amax[:, 0], scheme)
            codes = round_to_codes(linear.weight, scale, scheme).float().reshape(rows.shape)
            linear.weight.copy_((codes * scale.float().reshape(*amax.shape, 1)).reshape(linear.weight.shape))
            if scheme.activation_bits:
                amax = layer.ranges[clips.activation]
                quantizers[name] = activation_scale(amax, scheme.activation_bits), scheme.activation_bits
    with fake_quantize_inputs(module, quantizers):
        _, outputs = record_linear_outputs(module, last, run, batches)
    for name, weight in weights.items():
        get_linear(module, name).weight.copy_(weight)
    return outputs
