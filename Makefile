# train_gpt_fp8. `make` builds the trainer, `make run` trains the default model on a default corpus, `make test` runs
# every test that this machine can run. `make help` lists the rest.
#
# Every source file is found by wildcard and its header dependencies come from the compiler, so a new kernel, dev
# program or test needs no edit here.

.DEFAULT_GOAL := all
CUDA ?= /usr/local/cuda
ARCH ?= 90a
BUILD ?= build/sm_$(ARCH)
NVCC := $(CUDA)/bin/nvcc
CCACHE := $(shell command -v ccache 2>/dev/null)
JOBS ?= $(shell nproc)
PYTHON ?= python3

# Header-only libraries that the system lacks are brought into deps/ by `make deps`.
INCLUDES := -I. -isystem deps/include
WARNINGS := -Wall -Wextra -Wno-missing-field-initializers -Werror
OPTIMIZE ?= -O3
# wgmma and setmaxnreg exist in sm_90a alone; sm_90 would compile Hopper's kernels to nothing.
$(if $(filter 90,$(ARCH)),$(error ARCH=90: Hopper GPUs are built for as ARCH=90a))
DEFINES := -DTRAIN_GPT_ARCH=$(patsubst %a,%,$(ARCH))
CXXFLAGS = -std=c++20 $(DEFINES) $(OPTIMIZE) -g1 -fPIC -fopenmp $(WARNINGS) $(INCLUDES) -isystem $(CUDA)/include $(EXTRA_CXXFLAGS)
# A spill is an error, but for sm_120: there the attention of head dimension 128 spills 8 bytes.
SPILLS := $(if $(filter 120,$(ARCH)),,-Xptxas --warn-on-spills)
NVCCFLAGS = -std=c++20 $(DEFINES) $(OPTIMIZE) -lineinfo $(INCLUDES) -gencode=arch=compute_$(ARCH),code=sm_$(ARCH) \
             --expt-relaxed-constexpr -Werror all-warnings \
             $(SPILLS) -Xcompiler "-Wall -Wextra -fopenmp -Wno-unused-parameter -Wno-missing-field-initializers" $(EXTRA_NVCCFLAGS)
# What data/ needs, static: a program runs on machines that lack them.
DATA_LIBS := -Ldeps/lib -l:libpcre2-8.a -l:libz.a -l:libzstd.a
LDLIBS := -L$(CUDA)/lib64 -Xlinker -rpath -Xlinker $(CUDA)/lib64 -lcublasLt -lcublas -ldl -lpthread -lgomp $(DATA_LIBS)
# CUPTI is loaded at run time, by --profile alone; its headers lie beside CUDA's or here.
$(BUILD)/trainer/cupti_profiler.o: CXXFLAGS += -isystem $(CUDA)/extras/CUPTI/include
LDLIBS += -Xlinker -rpath -Xlinker $(CUDA)/extras/CUPTI/lib64

# Optional libraries: used when their header is here, from where it is. Of each: the header, the folders to look in (MPI's are
# known to Open MPI's compiler alone), what links it, and what is lost without it. What is missing is said once a build folder;
# WITHOUT="MPI NCCL" ignores some. NCCL, MPI, CUDNN then hold the folder of the header, or nothing.
OPTIONAL := NCCL MPI CUDNN CUDNN_FRONTEND
SYSTEM_INCLUDES := $(CUDA)/include /usr/include /usr/include/$(shell uname -m)-linux-gnu /usr/local/include
NCCL_HEADER := nccl.h
NCCL_FOLDERS := $(SYSTEM_INCLUDES)
NCCL_LOST := no training on several GPUs
MPI_HEADER := mpi.h
MPI_FOLDERS := $(shell mpicxx --showme:incdirs 2>/dev/null)
MPI_LIBS := $(shell mpicxx --showme:link 2>/dev/null)
MPI_LOST := ranks find each other by TCP, also under mpirun
CUDNN_HEADER := cudnn.h
CUDNN_FOLDERS := $(SYSTEM_INCLUDES)
CUDNN_LOST := no --attention cudnn (needs its headers; the library is opened at run time)
CUDNN_FRONTEND_HEADER := cudnn_frontend.h
CUDNN_FRONTEND_FOLDERS := deps/include $(SYSTEM_INCLUDES)
CUDNN_FRONTEND_LOST := no --attention cudnn (`make cudnn-frontend` brings it)
header_folder = $(if $(filter $1,$(WITHOUT)),,$(firstword $(foreach d,$($1_FOLDERS),$(if $(wildcard $d/$($1_HEADER)),$d))))
$(foreach l,$(OPTIONAL),$(eval $l := $(call header_folder,$l)))
ABSENT := $(foreach l,$(OPTIONAL),$(if $($l),,$l))
$(shell mkdir -p $(BUILD) && echo '$(foreach l,$(OPTIONAL),$l=$($l))' | cmp -s - $(BUILD)/libraries.txt || { \
  echo '$(foreach l,$(OPTIONAL),$l=$($l))' > $(BUILD)/libraries.txt; $(foreach l,$(ABSENT),echo '  $l is not here: $($l_LOST)' >&2;) })
# $(eval $(call uses,NCCL,trainer/x)): -DTRAIN_GPT_NCCL for that object if NCCL is here, and a rebuild when that changes.
define uses
$(BUILD)/$2.o: $(BUILD)/libraries.txt
$(BUILD)/$2.o: DEFINES += $(if $($1),-DTRAIN_GPT_$1 $(addprefix -isystem ,$(filter-out /usr/include,$($1))))
endef
$(eval $(call uses,CUDNN,kernels/attention/cudnn))
$(eval $(call uses,CUDNN_FRONTEND,kernels/attention/cudnn))

KERNEL_OBJECTS := $(patsubst %.cu,$(BUILD)/%.o,$(wildcard kernels/*.cu kernels/*/*.cu)) \
                  $(patsubst %.cpp,$(BUILD)/%.o,$(wildcard kernels/*.cpp kernels/*/*.cpp))
TRAINER_OBJECTS := $(patsubst %.cpp,$(BUILD)/%.o,$(wildcard trainer/*.cpp trainer/reference/*.cpp trainer/run/*.cpp trainer/distributed/*.cpp))
DATA_PROGRAMS := prepare inspect
DATA_OBJECTS := $(patsubst %.cpp,$(BUILD)/%.o,$(filter-out $(DATA_PROGRAMS:%=data/%.cpp),$(wildcard data/*.cpp)))
DEV_PROGRAMS := $(patsubst dev/%.cu,%,$(wildcard dev/*.cu))
COMMIT := $(shell git describe --always --dirty --abbrev=9 2>/dev/null || echo unknown)
HOST_TESTS := $(patsubst %.cpp,$(BUILD)/%,$(wildcard tests/host/*.cpp))

$(eval $(call uses,NCCL,trainer/distributed/nccl_communicator))
# MPI is a plugin that the program loads when mpirun started it: the program itself starts where there is no MPI.
MPI_PLUGIN := $(if $(MPI),$(BUILD)/mpi_plugin.so)
$(BUILD)/mpi_plugin.so: trainer/distributed/mpi/plugin.cpp trainer/distributed/mpi/plugin.h $(BUILD)/libraries.txt
	@mkdir -p $(@D) && echo "  mpi  $<" && $(CXX) -std=c++20 $(OPTIMIZE) -fPIC -shared $(WARNINGS) -DOMPI_SKIP_MPICXX -DMPICH_SKIP_MPICXX -I. \
	  $(addprefix -isystem ,$(MPI_FOLDERS)) $< -o $@ $(MPI_LIBS)

.PHONY: all
all: train_gpt_fp8 $(DATA_PROGRAMS:%=data/%) $(MPI_PLUGIN)

# Links to the build of this ARCH. make follows a link and would think the one to another ARCH up to date: hence `links`.
train_gpt_fp8: $(BUILD)/train_gpt_fp8 links
	@[ "$$(readlink $@)" = "$<" ] || ln -sf $< $@
$(DATA_PROGRAMS:%=data/%): data/%: $(BUILD)/data/% links
	@[ "$$(readlink $@)" = "../$<" ] || ln -sf ../$< $@
.PHONY: links
links:

$(BUILD)/train_gpt_fp8: $(BUILD)/train_gpt_fp8.o $(TRAINER_OBJECTS) $(KERNEL_OBJECTS) $(DATA_OBJECTS)
	@echo "  link $@" && $(NVCC) $(NVCCFLAGS) -o $@ $^ $(LDLIBS)
$(DATA_PROGRAMS:%=$(BUILD)/data/%): $(BUILD)/data/%: $(BUILD)/data/%.o $(DATA_OBJECTS)
	@echo "  link $@" && $(CXX) -o $@ $^ $(DATA_LIBS) -lpthread -lgomp

# Dev programs link the product's own objects: a kernel exists once. dev/NAME.cu of a kernel needs just that kernel, with
# the backends in its folder kernels/NAME/ if it has one; any other dev program gets everything. What a dev program is too
# long to hold itself is in dev/parts/NAME/.
DEV_COMMON := $(BUILD)/dev/harness.o $(BUILD)/trainer/reference/quantizer.o $(BUILD)/kernels/common/mark.o
backends = $(filter $(BUILD)/kernels/$1/%,$(KERNEL_OBJECTS))
dev_parts = $(patsubst %,$(BUILD)/%.o,$(basename $(wildcard dev/parts/$1/*.cu dev/parts/$1/*.cpp)))
.SECONDEXPANSION:
$(BUILD)/dev/%: $(BUILD)/dev/%.o $$(call dev_parts,$$*) $(DEV_COMMON) \
        $$(if $$(wildcard kernels/$$*.cu),$(BUILD)/kernels/$$*.o $$(call backends,$$*),$(TRAINER_OBJECTS) $(KERNEL_OBJECTS) $(DATA_OBJECTS))
	@echo "  link $@" && $(NVCC) $(NVCCFLAGS) -o $@ $(sort $^) $(LDLIBS)
# The GPU's parameters on a stand-in for the GPU: its runtime and kernels in place of CUDA's and the product's.
FAKE_GPU := $(patsubst %.cpp,$(BUILD)/%.o,$(wildcard tests/fake_gpu/*.cpp trainer/distributed/*.cpp)) \
            $(addprefix $(BUILD)/trainer/,$(addsuffix .o,gpu_parameters gpu_parameters_step two_streams sharding_schedule parallel parameters \
              model_spec recipe reference/quantizer)) $(BUILD)/kernels/common/arena.o $(BUILD)/kernels/common/mark.o
$(BUILD)/tests/host/test_gpu_parameters: $(BUILD)/tests/host/test_gpu_parameters.o $(FAKE_GPU)
	@echo "  link $@" && $(CXX) -o $@ $^ -lgtest -lgtest_main -ldl -lpthread -lgomp
# The copier on a CUDA runtime that its test brings.
$(BUILD)/tests/host/test_host_copier: $(BUILD)/tests/host/test_host_copier.o $(BUILD)/trainer/host_copier.o
	@echo "  link $@" && $(CXX) -o $@ $^ -lgtest -lgtest_main -lpthread -lgomp
$(BUILD)/tests/host/%: $(BUILD)/tests/host/%.o $(TRAINER_OBJECTS) $(KERNEL_OBJECTS) $(DATA_OBJECTS)
	@echo "  link $@" && $(NVCC) $(NVCCFLAGS) -o $@ $^ $(LDLIBS) -lgtest -lgtest_main

# ptxas tells of wgmmas that it serialized, and of a setmaxnreg that it ignored, as information (C75xx): here an error.
$(BUILD)/%.o: %.cu | deps-check
	@mkdir -p $(@D) && echo "  nvcc $<" && $(CCACHE) $(NVCC) $(NVCCFLAGS) -MMD -MP -MF $(@:.o=.d) -MT $@ -c $< -o $@ 2>$@.err; \
	  status=$$?; cat $@.err >&2; grep -q '(C75[0-9][0-9])' $@.err && status=1; rm -f $@.err; [ $$status = 0 ] || { rm -f $@; exit 1; }
$(BUILD)/%.o: %.cpp | deps-check
	@mkdir -p $(@D) && echo "  c++  $<" && $(CCACHE) $(CXX) $(CXXFLAGS) -MMD -MP -MF $(@:.o=.d) -MT $@ -c $< -o $@
.SECONDARY:
-include $(shell find $(BUILD) -name '*.d' 2>/dev/null)
include tests/fuzz/fuzz.mk
include data/corpora.mk

# ----------------------------------------------------------------------------------------------------------------------
# One kernel at a time: make check-NAME, make bench-NAME for every dev/NAME.cu

check-%: $(BUILD)/dev/%
	$< check
bench-%: $(BUILD)/dev/%
	$< bench
.PHONY: dev
dev: $(addprefix $(BUILD)/dev/,$(DEV_PROGRAMS))

.PHONY: host-tests
host-tests: $(HOST_TESTS) $(MPI_PLUGIN)

# The commit is compiled into one small object, rebuilt when it changes.
$(shell mkdir -p $(BUILD) && echo '$(COMMIT)' | cmp -s - $(BUILD)/commit.txt || echo '$(COMMIT)' > $(BUILD)/commit.txt)
$(BUILD)/trainer/gpu_info.o: $(BUILD)/commit.txt
$(BUILD)/trainer/gpu_info.o: DEFINES += -DTRAIN_GPT_COMMIT='"$(COMMIT)"'

# ----------------------------------------------------------------------------------------------------------------------
# Train: a default corpus that needs no network, a model that suits the machine

HAS_GPU = $(shell nvidia-smi -L >/dev/null 2>&1 && echo yes)
shards/cuda_headers/meta.json: | data/prepare
	data/prepare --out shards/cuda_headers --tokenizer bytes $(CUDA)/include

RUN_GPU := --model gpt2-124M --vocab-size 257 --seq-len 1024 --micro-batch 32 --global-batch-tokens 131072 --steps 150 \
           --lr 6e-4 --warmup-steps 20 --eval-every 50 --recipe tensorwise
RUN_CPU := --model tiny --device cpu --micro-batch 16 --global-batch-tokens 4096 --steps 400 --lr 3e-3 \
           --eval-every 100 --eval-tokens 65536 --recipe tensorwise --log-every 25
.PHONY: run
run: all shards/cuda_headers/meta.json
	./train_gpt_fp8 --train shards/cuda_headers --val shards/cuda_headers $(if $(HAS_GPU),$(RUN_GPU),$(RUN_CPU)) $(ARGS)

# ----------------------------------------------------------------------------------------------------------------------
# Proof

# Every option with its default, from the program itself; a test checks that the file is current.
.PHONY: options
options: train_gpt_fp8
	./train_gpt_fp8 --help-markdown > OPTIONS.md

.PHONY: test plot layers attention-archs gpu-report gpu-report-check learning mutants
# libgomp's threads spin at barriers by default, which is ruinous when another program holds a core.
test run: export OMP_WAIT_POLICY ?= passive
test: all dev host-tests attention-archs fuzz-programs shards/cuda_headers/meta.json
	$(PYTHON) tests/run_tests.py --build $(BUILD) --fuzz-seconds $(FUZZ_SECONDS)
layers:
	$(PYTHON) tests/layers.py
# make plot RUNS="runs/a runs/b" [PNG=runs.png]
PNG ?= runs.png
plot:
	@test -n "$(RUNS)" || { echo 'make plot: RUNS is missing: make plot RUNS="runs/a runs/b"' >&2; exit 2; }
	@$(PYTHON) dev/plot.py --out $(PNG) $(RUNS)
# The attention path of every GPU compiles for the oldest, the FP8-capable older one, Hopper and the newest.
attention-archs:
	@$(foreach arch,80 89 90a 120,$(MAKE) --no-print-directory ARCH=$(arch) $(patsubst %.cu,build/sm_$(arch)/%.o,$(wildcard kernels/attention/*.cu)) &&) :
# On a machine with a GPU; STALE=1 remakes only what does not match the sources any more.
gpu-report: all dev
	$(PYTHON) tests/gpu/report.py --build $(BUILD) $(if $(STALE),--stale-only) $(NAMES)
# The long one: three runs of GPT-2 124M and PyTorch's, on shards of GPT-2 tokens (tests/gpu/README.md).
SHARDS ?= shards/code_gpt2
learning: all dev
	LEARNING_SHARDS=$(SHARDS) $(PYTHON) tests/gpu/report.py --build $(BUILD) learning
gpu-report-check:
	@$(PYTHON) tests/gpu/report.py --build $(BUILD) --check
mutants: all
	$(PYTHON) tests/mutants.py

# ----------------------------------------------------------------------------------------------------------------------
# Required libraries that the system lacks (Debian packages), and the headers of cudnn-frontend (a Python package), unpacked
# into deps/, which can travel to a machine without network

DEPS := CLI/CLI.hpp:libcli11-dev nlohmann/json.hpp:nlohmann-json3-dev pcre2.h:libpcre2-dev toml++/toml.h:libtomlplusplus-dev gtest/gtest.h:libgtest-dev \
        zlib.h:zlib1g-dev zstd.h:libzstd-dev
MISSING_DEPS = $(strip $(foreach d,$(DEPS),$(if $(wildcard /usr/include/$(firstword $(subst :, ,$d)) deps/include/$(firstword $(subst :, ,$d))),,$d)))
.PHONY: deps deps-check cudnn-frontend
deps: cudnn-frontend
	@mkdir -p deps/download && cd deps/download && rm -f *.deb && echo "  downloading $(foreach d,$(DEPS),$(lastword $(subst :, ,$d)))" && \
	  { apt-get download -qq $(foreach d,$(DEPS),$(lastword $(subst :, ,$d))) || { apt-get update -qq && \
	    apt-get download -qq $(foreach d,$(DEPS),$(lastword $(subst :, ,$d))); }; } && \
	  for f in *.deb; do dpkg -x $$f unpacked; done && mkdir -p ../include ../lib && \
	  cp -r $$(ls -d unpacked/usr/include/. unpacked/usr/include/*-linux-gnu/. 2>/dev/null) ../include/ && cp $$(find unpacked/usr/lib -name '*.a') ../lib/ && \
	  cd .. && rm -rf download && echo "  deps/ is complete: it can be copied to a machine without network"
# Optional: without it there is no --attention cudnn.
cudnn-frontend:
	@$(if $(CUDNN_FRONTEND),:,mkdir -p deps/include && t=$$(mktemp -d) && \
	  { $(PYTHON) -m pip download -q --no-deps --disable-pip-version-check -d $$t nvidia-cudnn-frontend && \
	    $(PYTHON) -m zipfile -e $$t/*.whl $$t && cp -r $$t/include/. deps/include/ && echo "  cudnn-frontend's headers are in deps/include" || \
	    echo "  no cudnn-frontend headers from pip: building without --attention cudnn"; }; rm -rf $$t)
deps-check:
	@$(if $(MISSING_DEPS),echo "  missing headers: $(MISSING_DEPS)" && $(MAKE) --no-print-directory deps,:)

.PHONY: clean help
clean:
	rm -rf build train_gpt_fp8 $(DATA_PROGRAMS:%=data/%)
help:
	@echo "make                  build train_gpt_fp8, data/prepare and data/inspect (ARCH=80: BF16 only, for sm_80 cards)"
	@echo "make run              train the default model on the default corpus (ARGS=... adds options)"
	@echo "make test             every test that this machine can run"
	@echo "make check-NAME       correctness of one kernel on the GPU; bench-NAME its speed; NAME in: $(DEV_PROGRAMS)"
	@echo "make gpu-report       remake tests/gpu_report/ on a GPU (STALE=1: only what is stale)"
	@echo "make deps             bring the libraries that the system lacks into deps/"
	@echo "make data-NAME        prepare shards/NAME from a corpus: $(CORPORA) (the last: FOLDER=your text)"
	@echo "make fuzz             fuzz every parser (FUZZ_SECONDS=60 each; needs clang)"
	@echo "make plot RUNS=...    draw runs to runs.png: loss, learning rate, norm, tokens/s (PNG=...)"
	@echo "make options          remake OPTIONS.md, the table of every option"
	@echo "make mutants          plant bugs, each of which a test must find"
	@echo "make learning         the long comparison with PyTorch on a GPU (tests/gpu/README.md)"
	@echo "make layers           check the direction of includes"
	@echo "make attention-archs  compile the attention path of every GPU for sm_80, 89, 90a and 120"
	@echo "make clean            remove what was built"
