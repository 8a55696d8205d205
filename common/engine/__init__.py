"""The real decoder: parameters, model, KV arena and runner. Only this package and `common.kernels` import torch."""
