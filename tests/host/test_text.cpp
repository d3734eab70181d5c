// Text at the edges: bytes made printable, and questions from a file.
#include <gtest/gtest.h>

#include <random>

#include "data/printable.h"
#include "data/questions.h"
#include "data/utf8.h"
#include "tests/host/temp_folder.h"

namespace {

const std::string kReplacement = "\xef\xbf\xbd";

TEST(Printable, TextStaysWhatItIs) {
    for (const std::string text : {"", "plain\n\ttext", "h\xc3\xa9llo \xe2\x82\xac \xf0\x9f\x99\x82"}) EXPECT_EQ(printable(text), text);
}

TEST(Printable, WhatCannotBePrintedIsReplaced) {
    EXPECT_EQ(printable("a\xff" "b"), "a" + kReplacement + "b");
    EXPECT_EQ(printable("\x1b[2J"), "\xe2\x90\x9b[2J");      // U+241B
    EXPECT_EQ(printable(std::string("\0", 1)), "\xe2\x90\x80");
    EXPECT_EQ(printable("\x7f\r"), "\xe2\x90\xa1\xe2\x90\x8d");
    EXPECT_EQ(printable("\xc2\x9b"), kReplacement);           // a control character of two bytes
    EXPECT_EQ(printable("\xc2\xa0"), "\xc2\xa0");
}

TEST(Printable, CutSequences) {
    EXPECT_EQ(cut_sequence(""), 0u);
    EXPECT_EQ(cut_sequence("abc"), 0u);
    EXPECT_EQ(cut_sequence("a\xe2"), 1u);
    EXPECT_EQ(cut_sequence("a\xe2\x82"), 2u);
    EXPECT_EQ(cut_sequence("a\xe2\x82\xac"), 0u);
    EXPECT_EQ(cut_sequence("\xf0\x9f\x99"), 3u);
    EXPECT_EQ(cut_sequence("\xf0\x9f\xff"), 0u);  // cannot become a character any more
    EXPECT_EQ(cut_sequence("\xe0\x80"), 0u);
    EXPECT_EQ(cut_sequence("\x82"), 0u);
    EXPECT_EQ(cut_sequence("\xff"), 0u);
}

TEST(Printable, PiecesGiveWhatTheWholeGives) {
    std::mt19937 random(1);
    const std::string alphabet = "a\n\x1b\xc2\xc3\xa9\xe2\x82\xac\xf0\x9f\x99\x82\xff\x9b\x7f";
    for (int round = 0; round < 2000; ++round) {
        std::string bytes, text;
        PrintableStream stream;
        for (size_t piece = 0, pieces = random() % 12; piece < pieces; ++piece) {
            std::string part;
            for (size_t i = 0, n = random() % 4; i < n; ++i) part += alphabet[random() % alphabet.size()];
            bytes += part;
            const std::string out = stream.push(part);
            std::string scratch;
            EXPECT_EQ(valid_utf8(out, scratch).data(), out.data()) << "not valid UTF-8";
            text += out;
        }
        EXPECT_EQ(text + stream.finish(), printable(bytes));
    }
}

TEST(Printable, ACharacterAppearsWhenItIsComplete) {
    PrintableStream stream;
    EXPECT_EQ(stream.push("\xe2"), "");
    EXPECT_EQ(stream.push("\x82"), "");
    EXPECT_EQ(stream.push("\xac!"), "\xe2\x82\xac!");
    EXPECT_EQ(stream.push("x\xe2"), "x");
    EXPECT_EQ(stream.finish(), kReplacement);
    EXPECT_EQ(stream.finish(), "");
}

// ---------------------------------------------------------------------------------------------------------------------

std::vector<Question> questions_of(const std::string& text) {
    const TempFolder folder;
    write_file(folder / "q.jsonl", text);
    return read_questions(folder / "q.jsonl");
}

TEST(Questions, BothSpellings) {
    const std::vector<Question> q = questions_of(
        "{\"context\": \"a\", \"endings\": [\"x\", \"y\"], \"label\": 1}\n\n"
        "{\"ind\": 24, \"ctx\": \"b\", \"endings\": [\"x\", \"y\", \"z\"], \"label\": \"2\", \"source_id\": \"s\"}");
    ASSERT_EQ(q.size(), 2u);
    EXPECT_EQ(q[0].context, "a");
    EXPECT_EQ(q[0].label, 1);
    EXPECT_EQ(q[1].context, "b");
    EXPECT_EQ(q[1].endings, (std::vector<std::string>{"x", "y", "z"}));
    EXPECT_EQ(q[1].label, 2);
}

TEST(Questions, ErrorsNameTheLine) {
    const std::string good = "{\"context\": \"a\", \"endings\": [\"x\", \"y\"], \"label\": 1}\n";
    for (const std::string bad : {
             "not json", "[1]", "{\"context\": \"a\", \"label\": 0}", "{\"endings\": [\"x\", \"y\"], \"label\": 0}",
             "{\"context\": 5, \"endings\": [\"x\", \"y\"], \"label\": 0}", "{\"context\": \"a\", \"endings\": [\"x\"], \"label\": 0}",
             "{\"context\": \"a\", \"endings\": [\"x\", \"\"], \"label\": 0}", "{\"context\": \"a\", \"endings\": [\"x\", 3], \"label\": 0}",
             "{\"context\": \"a\", \"endings\": \"xy\", \"label\": 0}", "{\"context\": \"a\", \"endings\": [\"x\", \"y\"]}",
             "{\"context\": \"a\", \"endings\": [\"x\", \"y\"], \"label\": 2}", "{\"context\": \"a\", \"endings\": [\"x\", \"y\"], \"label\": -1}",
             "{\"context\": \"a\", \"endings\": [\"x\", \"y\"], \"label\": \"1x\"}", "{\"context\": \"a\", \"endings\": [\"x\", \"y\"], \"label\": 1.0}",
             "{\"context\": \"a\", \"endings\": [\"x\", \"y\"], \"label\": 18446744073709551615}",
             "{\"context\": \"a\", \"endings\": [\"x\", \"y\"], \"label\": \"99999999999999999999\"}"}) {
        try {
            questions_of(good + bad + "\n");
            ADD_FAILURE() << bad;
        } catch (const Error& error) {
            EXPECT_NE(std::string(error.what()).find("q.jsonl line 2: "), std::string::npos) << error.what();
        }
    }
}

TEST(Questions, MissingOrEmptyFile) {
    EXPECT_THROW(read_questions("/nonexistent/q.jsonl"), Error);
    EXPECT_THROW(read_questions("/"), Error);
    EXPECT_THROW(questions_of("\n \n"), Error);
}

}  // namespace
