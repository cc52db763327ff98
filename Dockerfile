# docker build -t distmatch . ; see docs/launch.md
FROM python:3.12-slim
RUN pip install --no-cache-dir uv
WORKDIR /app
COPY pyproject.toml README.md LICENSE ./
COPY src src
RUN uv pip install --system --no-cache ".[diffusers,metrics,serve,tensorboard]"
WORKDIR /work
CMD ["distmatch", "--help"]
