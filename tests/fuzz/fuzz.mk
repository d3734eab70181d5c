# Fuzzing: one libFuzzer program a parser, under AddressSanitizer and UBSan. Part of `make test`, which runs each for
# FUZZ_SECONDS (0: its seeds only). `make fuzz` runs them alone. Needs clang and its runtime libraries (Debian: clang,
# libclang-rt-14-dev); where they lack, the tests are counted as skipped.

FUZZ_SECONDS ?= 0
CLANG ?= clang++
FUZZ_BUILD := $(BUILD)/fuzz
FUZZ_FLAGS = -std=c++20 $(DEFINES) -O1 -g1 $(INCLUDES) -isystem $(CUDA)/include \
             -fsanitize=fuzzer-no-link,address,undefined -fno-sanitize-recover=all
# The parsers are instrumented; what else they need comes from the objects of the product.
FUZZ_TRAINER := checkpoint checkpoint_check checkpoint_folders checkpoint_header checkpoint_read checksum safetensors parameters model_spec recipe config config_rules config_toml standard_output ascii_toml schedule
FUZZ_SOURCES := $(filter-out $(DATA_PROGRAMS:%=data/%.cpp),$(wildcard data/*.cpp)) $(FUZZ_TRAINER:%=trainer/%.cpp)
FUZZ_OBJECTS := $(FUZZ_SOURCES:%.cpp=$(FUZZ_BUILD)/%.o)
FUZZ_REST := $(filter-out $(FUZZ_SOURCES:%.cpp=$(BUILD)/%.o),$(TRAINER_OBJECTS) $(KERNEL_OBJECTS))
FUZZ_PROGRAMS := $(patsubst tests/fuzz/%.cpp,$(FUZZ_BUILD)/%,$(wildcard tests/fuzz/fuzz_*.cpp))

$(FUZZ_BUILD)/%.o: %.cpp | deps-check
	@mkdir -p $(@D) && echo "  fuzz $<" && $(CCACHE) $(CLANG) $(FUZZ_FLAGS) -MMD -MP -MF $(@:.o=.d) -MT $@ -c $< -o $@
$(FUZZ_BUILD)/parsers.a: $(FUZZ_OBJECTS)
	@rm -f $@ && ar rcs $@ $^
$(FUZZ_BUILD)/rest.a: $(FUZZ_REST)
	@mkdir -p $(@D) && rm -f $@ && ar rcsT $@ $^
$(FUZZ_BUILD)/fuzz_%: $(FUZZ_BUILD)/tests/fuzz/fuzz_%.o $(FUZZ_BUILD)/tests/fuzz/exact_map.o $(FUZZ_BUILD)/parsers.a $(FUZZ_BUILD)/rest.a
	@echo "  link $@" && $(CLANG) -fsanitize=fuzzer,address,undefined -Wl,--wrap=mmap,--wrap=munmap -Wl,--as-needed -o $@ $^ $(LDLIBS) -lcudart_static -lrt

FUZZ_PROBE := int LLVMFuzzerTestOneInput(const unsigned char *data, unsigned long size) { return data && size > 9; }
.PHONY: fuzz fuzz-programs fuzz-build
fuzz-build: $(FUZZ_PROGRAMS)
# The product's objects first: the second make must not build them beside this one.
fuzz-programs: $(FUZZ_REST)
	@if echo '$(FUZZ_PROBE)' | $(CLANG) -x c -fsanitize=fuzzer,address,undefined - -o $(BUILD)/fuzz_probe 2>/dev/null; \
	 then rm -f $(BUILD)/fuzz_probe && $(MAKE) --no-print-directory fuzz-build; \
	 else echo "  $(CLANG) with libFuzzer is not here: the parsers are not fuzzed"; rm -rf $(FUZZ_BUILD); fi
fuzz: fuzz-programs $(BUILD)/train_gpt_fp8
	$(PYTHON) tests/fuzz_tests.py --build $(BUILD) --seconds $(FUZZ_SECONDS)
