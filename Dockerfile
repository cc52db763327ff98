# docker build -t distmatch . ; see docs/containers.md
FROM python:3.12-slim
# torch.compile calls a C++ compiler
RUN apt-get update && apt-get install -y --no-install-recommends g++ && rm -rf /var/lib/apt/lists/*
RUN pip install --no-cache-dir uv
WORKDIR /app
COPY pyproject.toml README.md LICENSE ./
COPY src src
RUN uv pip install --system --no-cache ".[cloud,diffusers,metrics,serve,tensorboard]"
WORKDIR /work
CMD ["distmatch", "--help"]
