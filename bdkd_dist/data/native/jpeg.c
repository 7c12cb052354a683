/* Decodes the part of a JPEG that a crop needs, and no more: see ../jpeg.py.
 *
 * Rows above the window are entropy-decoded only, so are columns beside it, and nothing is read below it. Any error and
 * any warning of libjpeg ends the call with a code: nothing is printed, the process never exits. There is no state
 * between calls, so threads need no lock.
 */

#include <setjmp.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>

#include <jpeglib.h>

enum { SOUND, DAMAGED, UNSUPPORTED, OTHER_SIZE };

/* Fancy upsampling mixes each chroma sample with its neighbours, and libjpeg takes the edges of a crop for edges of
 * the image: the crop is wider by one chroma sample on each side. */
enum { MARGIN_PX = 2 };

struct decoder {
    struct jpeg_decompress_struct jpeg; /* first: libjpeg's callbacks get its address */
    struct jpeg_error_mgr errors;
    jmp_buf escape;
};

static void leave(j_common_ptr jpeg) { longjmp(((struct decoder *)jpeg)->escape, 1); }

static void leave_on_warning(j_common_ptr jpeg, int level) {
    if (level < 0) leave(jpeg);
}

static void say_nothing(j_common_ptr jpeg) { (void)jpeg; }

/* Prepare for libjpeg's errors. The caller calls setjmp(decoder->escape) next, then open_jpeg. */
static void guard(struct decoder *decoder) {
    memset(decoder, 0, sizeof *decoder);
    decoder->jpeg.err = jpeg_std_error(&decoder->errors);
    decoder->errors.error_exit = leave;
    decoder->errors.emit_message = leave_on_warning;
    decoder->errors.output_message = say_nothing;
}

/* Read the header; returns SOUND where libjpeg makes RGB of such an image. */
static int open_jpeg(struct jpeg_decompress_struct *jpeg, const unsigned char *encoded, uint64_t bytes) {
    jpeg_create_decompress(jpeg);
    jpeg_mem_src(jpeg, encoded, (unsigned long)bytes);
    jpeg_read_header(jpeg, TRUE);
    switch (jpeg->jpeg_color_space) {
    case JCS_GRAYSCALE:
    case JCS_YCbCr:
    case JCS_RGB:
        return SOUND;
    default:
        return UNSUPPORTED;
    }
}

/* Decode the rows of `window` (top, left, height, width in pixels of the reduced image) to `out`, packed RGB. The
 * window's left and width become those of the columns that were decoded, which include the ones asked for. */
static void read_window(struct jpeg_decompress_struct *jpeg, int32_t window[4], unsigned char *out) {
    JDIMENSION top = window[0], bottom = window[0] + window[2], right = window[1] + window[3] + MARGIN_PX;
    JDIMENSION left = window[1] > MARGIN_PX ? window[1] - MARGIN_PX : 0;
    if (right > jpeg->output_width) right = jpeg->output_width;
    JDIMENSION width = right - left;
    if (width < jpeg->output_width) jpeg_crop_scanline(jpeg, &left, &width);
    if (top > 0) jpeg_skip_scanlines(jpeg, top);
    while (jpeg->output_scanline < bottom) {
        JSAMPROW row = out + (size_t)(jpeg->output_scanline - top) * width * 3;
        jpeg_read_scanlines(jpeg, &row, 1);
    }
    window[1] = left;
    window[3] = width;
}

int bdkd_decode(const unsigned char *encoded, uint64_t bytes, int32_t height, int32_t width, int32_t reduction,
                int32_t window[4], unsigned char *out) {
    struct decoder decoder;
    struct jpeg_decompress_struct *jpeg = &decoder.jpeg;
    guard(&decoder);
    if (setjmp(decoder.escape)) {
        jpeg_destroy_decompress(jpeg);
        return DAMAGED;
    }
    int code = open_jpeg(jpeg, encoded, bytes);
    if (code == SOUND && ((int32_t)jpeg->image_height != height || (int32_t)jpeg->image_width != width))
        code = OTHER_SIZE;
    if (code == SOUND) {
        jpeg->out_color_space = JCS_RGB;
        jpeg->scale_num = 1;
        jpeg->scale_denom = reduction;
        jpeg_start_decompress(jpeg);
        read_window(jpeg, window, out);
    }
    jpeg_destroy_decompress(jpeg);
    return code;
}

/* Entropy-decode all of a JPEG whose pixels come in one scan: nothing is kept of all its rows but the last. */
static void skim(struct jpeg_decompress_struct *jpeg) {
    jpeg->out_color_space = jpeg->jpeg_color_space;
    jpeg->do_fancy_upsampling = FALSE;
    jpeg->scale_num = 1;
    jpeg->scale_denom = 8;
    jpeg_start_decompress(jpeg);
    JSAMPARRAY row = (*jpeg->mem->alloc_sarray)((j_common_ptr)jpeg, JPOOL_IMAGE,
                                                jpeg->output_width * jpeg->output_components, 1);
    if (jpeg->output_height > 1) jpeg_skip_scanlines(jpeg, jpeg->output_height - 1);
    jpeg_read_scanlines(jpeg, row, 1);
}

int bdkd_check(const unsigned char *encoded, uint64_t bytes) {
    struct decoder decoder;
    guard(&decoder);
    if (setjmp(decoder.escape)) {
        jpeg_destroy_decompress(&decoder.jpeg);
        return DAMAGED;
    }
    int code = open_jpeg(&decoder.jpeg, encoded, bytes);
    if (code == SOUND) {
        if (jpeg_has_multiple_scans(&decoder.jpeg))
            jpeg_read_coefficients(&decoder.jpeg);
        else
            skim(&decoder.jpeg);
        jpeg_finish_decompress(&decoder.jpeg);
    }
    jpeg_destroy_decompress(&decoder.jpeg);
    return code;
}
