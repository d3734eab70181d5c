# Named corpora: `make data-NAME` brings the text, checks it and prepares shards/NAME. TOKENIZER=bytes or gpt2 (default, when
# its ranks can be had); PREPARE=... adds options of data/prepare. `make data-mine FOLDER=...` takes your own text.
#
# A row: the folder of the text; for a Debian package its name, and the version and SHA-256 that were seen. Another version is
# taken, too: apt checks it against Debian's signed index.

golang-1.19-src_TEXT := downloads/golang-1.19-src/usr/share/go-1.19
golang-1.19-src_SEEN := 1.19.8-2 2dfa82fe4f08f4e0193c532e561af4c91871f5235608f04f2bb8d57bb288df5a
rust-src_TEXT := downloads/rust-src/usr/src
rust-src_SEEN := 1.63.0+dfsg1-2 410b8c6d464cabbe5fb3154ab8c3d374980dd597fbe7e3b7bb3ed8dd1bf11e25
python3.11-doc_TEXT := downloads/python3.11-doc/usr/share/doc/python3.11/html/_sources
python3.11-doc_SEEN := 3.11.2-6+deb12u9 5b3594189d6ef9a6963ce0347fd307a1cc67620ad697e144db366070e2e146be
DEBIAN_CORPORA := golang-1.19-src rust-src python3.11-doc
cuda-headers_TEXT := $(CUDA)/include
mine_TEXT := $(FOLDER)
CORPORA := $(DEBIAN_CORPORA) cuda-headers mine

TOKENIZER ?= gpt2
GPT2_RANKS_FILE := deps/gpt2.tiktoken

.PHONY: $(CORPORA:%=data-%) data-gpt2-ranks
data-gpt2-ranks:
	@[ -f $(GPT2_RANKS_FILE) ] || PYTHON=$(PYTHON) data/fetch.sh ranks $(GPT2_RANKS_FILE)

$(DEBIAN_CORPORA:%=downloads/%): downloads/%:
	@data/fetch.sh debian $* $@ $($*_SEEN)
$(DEBIAN_CORPORA:%=data-%): data-%: | downloads/%

$(CORPORA:%=data-%): data-%: | data/prepare
	@$(if $($*_TEXT),:,echo "error: make data-mine: FOLDER is missing: FOLDER=folder or file of text" >&2; exit 1)
	@tokenizer=$(TOKENIZER); \
	if [ $$tokenizer = gpt2 ] && ! $(MAKE) --no-print-directory data-gpt2-ranks 2>/dev/null; then \
	  echo "  GPT-2's ranks cannot be had here (make data-gpt2-ranks says why): the byte tokenizer serves"; tokenizer=bytes; fi; \
	data/prepare --out shards/$* --tokenizer $$tokenizer --overwrite $(PREPARE) "$($*_TEXT)"
