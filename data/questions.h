// Multiple-choice questions from a file, a JSON object a line:
//
//   {"context": "The cat sat on", "endings": ["the mat.", "the moon."], "label": 0}
//
// HellaSwag's own file is one: "ctx" may stand for "context", the label may be a string, other keys are not read.
#pragma once
#include <string>
#include <vector>

struct Question {
    std::string context;
    std::vector<std::string> endings;  // at least 2, none empty
    int label;                         // of the right ending
};

// An Error naming the line for anything else; blank lines are skipped. At least one question.
std::vector<Question> read_questions(const std::string& path);
