"""The mathematics of diffusion: schedules, denoisers, samplers, losses."""
