# Stage two: the trainer, with DeepSpeed. Build from the repository root:
#   docker build -f docker/train.Dockerfile -t asvr-train .
# Run on one machine:
#   docker run --gpus all --shm-size 16g -v /data:/data asvr-train asvr train /data/recipe.yaml --nproc 8
# On a cluster: docker/kubernetes/train.yaml, docker/slurm/train.sbatch.
FROM python:3.11-slim
# DeepSpeed compiles its communication op on machines without a GPU, and Triton its kernels on machines with one.
RUN apt-get update && apt-get install -y --no-install-recommends g++ && rm -rf /var/lib/apt/lists/*
WORKDIR /opt/asvr
COPY pyproject.toml constraints.txt README.md ./
COPY manifests manifests
COPY tokenize_stage tokenize_stage
COPY train_stage train_stage
COPY pipeline pipeline
RUN pip install --no-cache-dir --constraint constraints.txt '.[train]'
CMD ["asvr", "--help"]
