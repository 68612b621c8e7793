// Every kernel against plain loops in double precision: one program without Python and torch, for processors on which neither is
// at hand. `make test-arm` builds it with Debian's cross compiler for aarch64 and runs it under qemu-user (tests/kernels/test_arm.py).
//
//     driver           every case, with one thread and with three, whose results have to be equal to the bit
//     driver wrong     the same with references that are 2% off: every case has to fail, or it would never see anything
//
// To add a kernel: declare it in one of the headers of cases as its .cpp does, write a case that calls it on shapes that are multiples
// of nothing and compares what it wrote with `near` (within so much) or `same` (to the bit), and give the case a line in CASES below
// with the names of its kernels. test_arm.py fails for a kernel of every build that has no line there.
#include <omp.h>

#include <cstdio>
#include <string>

#include "attention_cases.h"
#include "generation_cases.h"
#include "step_cases.h"

static const struct {
    const char* kernels;
    void (*run)();
} CASES[] = {
    {"rms_forward rms_backward", norms<bf16>},
    {"rms_forward_fp32 rms_backward_fp32", norms<float>},
    {"rotate_rows", rotary<bf16>},
    {"rotate_rows_fp32", rotary<float>},
    {"silu_gate silu_gate_backward", gates<bf16>},
    {"silu_gate_fp32 silu_gate_backward_fp32", gates<float>},
    {"attention_vectors_space attention_vectors_forward attention_vectors_backward", attention},
    {"scale_rows scale_rows_backward", columns},
    {"dropout_rows dropout_mask", dropout},
    {"softmax_fold", softmax<bf16>},
    {"softmax_fold_fp32", softmax<float>},
    {"softmax_slope softmax_gather", slopes<bf16>},
    {"softmax_slope_fp32 softmax_gather_fp32", slopes<float>},
    {"store_bf16 store_float", stores},
    {"attend_bf16 attend_float", attends},
    {"decode_layers_bf16 decode_layers_float", steps},
    {"largest_bf16 largest_float draw_bf16 draw_float", choices},
    {"few_rows_bf16 few_rows_float low_rank_bf16 low_rank_float sum_words", rows_of_inputs},
    {"matmul_float", matrices},
    {"packed_open_flat packed_product_flat", flat_codes},
    {"packed_open_rows packed_product_rows", row_codes},
    {"packed_open_grid packed_product_grid", grid_codes},
    {"packed_open_halves packed_product_halves", half_codes},
};

int main(int count, char** words) {
    wrong = count > 1 && std::string(words[1]) == "wrong" ? 1.02 : 1;
    int bad = 0, cases = 0;
    for (const auto& one : CASES) {
        uint64_t digests[2];
        compared = failed = 0, worst = 0;
        for (int threads : {1, 3}) {
            omp_set_num_threads(threads);
            seed = 88172645463325252u, digest = 0xcbf29ce484222325u;
            one.run();
            digests[threads > 1] = digest;
        }
        const bool alike = digests[0] == digests[1];
        bad += failed || !alike, cases++;
        std::printf("%-6s %-76s %8ld numbers, %ld wrong, worst %.2f of what is allowed%s\n", failed || !alike ? "FAILED" : "ok",
                    one.kernels, compared, failed, worst, alike ? "" : ", other bits with other threads");
    }
    if (wrong != 1) return bad == cases ? 1 : 0;
    return bad ? 1 : 0;
}
