// Files of multiple-choice questions. What is read holds what an evaluation relies on.
#include "data/questions.h"
#include "kernels/common/check.h"
#include "tests/fuzz/memory_file.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
    static MemoryFile memory;
    try {
        const std::vector<Question> questions = read_questions(memory.assign(data, size));
        FUZZ_CHECK(!questions.empty());
        for (const Question& question : questions) {
            FUZZ_CHECK(question.endings.size() >= 2 && question.label >= 0 && static_cast<size_t>(question.label) < question.endings.size());
            for (const std::string& ending : question.endings) FUZZ_CHECK(!ending.empty());
        }
    } catch (const Error&) {  // the answer to damage; anything else is a finding
    }
    return 0;
}
