"""The diffusion process: noise schedule, solvers, denoiser, guidance, guided denoiser, prior."""
