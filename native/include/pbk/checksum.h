/*
 * What PostgreSQL asks of a page before it believes it. Any thread.
 *
 * Source: PostgreSQL src/include/storage/checksum_impl.h (pg_checksum_page), src/backend/storage/page/bufpage.c
 * (PageIsVerified).
 */
#ifndef PBK_CHECKSUM_H
#define PBK_CHECKSUM_H

#include <stdbool.h>
#include <stdint.h>

/* The checksum that a page of 8192 bytes has to have as block blkno of its fork; what it has now is not looked at. */
uint16_t pbk_page_checksum(const uint8_t *page, uint32_t blkno);

/* NULL if PostgreSQL would take the page, else why not: lower case, constant. */
const char *pbk_page_complaint(const uint8_t *page, uint32_t blkno, bool has_checksum);

#endif
