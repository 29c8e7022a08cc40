/* SPDX-License-Identifier: MIT */
/* The numbers and messages of docs/abi.md, sections 4 and 10, as far as this guest uses them. */
#ifndef VMBUS_H
#define VMBUS_H

#include <stddef.h>
#include <stdint.h>

#define MSR_GUEST_OS_ID 0x40000000u
#define MSR_HYPERCALL 0x40000001u
#define MSR_VP_INDEX 0x40000002u
#define MSR_TIME_REF_COUNT 0x40000020u
#define MSR_SCONTROL 0x40000080u
#define MSR_SVERSION 0x40000081u
#define MSR_SIEFP 0x40000082u
#define MSR_SIMP 0x40000083u
#define MSR_EOM 0x40000084u
#define MSR_SINT0 0x40000090u
#define MSR_NOT_THERE 0x40000fffu

#define REGISTER_ENABLE 1u
#define SINT_MASKED (1u << 16)
#define SINT_AUTO_EOI (1u << 17)

#define CPUID_FIRST 0x40000000u
#define CPUID_INTERFACE 0x40000001u
#define CPUID_HINTS 0x40000004u
#define HINT_DEPRECATE_AUTO_EOI (1u << 9)

#define HVCALL_POST_MESSAGE 0x5cu
#define HVCALL_SIGNAL_EVENT_FAST 0x1005du
#define HV_SUCCESS 0x00
#define HV_INVALID_PARAMETER 0x05
#define HV_INVALID_CONNECTION_ID 0x12
#define HV_INSUFFICIENT_BUFFERS 0x13

#define VMBUS_SINT 2
#define VMBUS_VECTOR 0xf3
#define SLOT_BYTES 256
#define MESSAGE_BYTES 240
#define CHANNEL_MESSAGE 1 /* message_type */
#define MSG_PENDING 1
#define CONTACT_CONNECTION 4
#define VERSION_5_3 0x00050003u

struct hv_message {
	_Atomic uint32_t message_type;
	uint8_t payload_size;
	_Atomic uint8_t message_flags;
	uint8_t reserved[2];
	uint64_t sender;
	uint8_t payload[MESSAGE_BYTES];
};
_Static_assert(sizeof(struct hv_message) == SLOT_BYTES, "hv_message");

struct post_message_input {
	uint32_t connection_id;
	uint32_t reserved;
	uint32_t message_type;
	uint32_t payload_size;
	uint8_t payload[MESSAGE_BYTES];
};
_Static_assert(sizeof(struct post_message_input) == 256, "hv_input_post_message");

enum {
	OFFERCHANNEL = 1,
	RESCIND_CHANNELOFFER = 2,
	REQUESTOFFERS = 3,
	ALLOFFERS_DELIVERED = 4,
	OPENCHANNEL = 5,
	OPENCHANNEL_RESULT = 6,
	CLOSECHANNEL = 7,
	GPADL_HEADER = 8,
	GPADL_BODY = 9,
	GPADL_CREATED = 10,
	GPADL_TEARDOWN = 11,
	GPADL_TORNDOWN = 12,
	RELID_RELEASED = 13,
	INITIATE_CONTACT = 14,
	VERSION_RESPONSE = 15,
	UNLOAD = 16,
	UNLOAD_RESPONSE = 17,
};

#define PACKED __attribute__((packed))

struct PACKED message_header {
	uint32_t msgtype;
	uint32_t padding;
};

struct PACKED initiate_contact {
	struct message_header header;
	uint32_t vmbus_version_requested;
	uint32_t target_vcpu;
	uint8_t msg_sint;
	uint8_t msg_vtl;
	uint8_t reserved[6];
	uint64_t monitor_page1;
	uint64_t monitor_page2;
};
_Static_assert(sizeof(struct initiate_contact) == 40, "INITIATE_CONTACT");

struct PACKED version_response {
	struct message_header header;
	uint8_t version_supported;
	uint8_t connection_state;
	uint16_t padding;
	uint32_t msg_conn_id;
};
_Static_assert(sizeof(struct version_response) == 16, "VERSION_RESPONSE");

struct PACKED offer_channel {
	struct message_header header;
	uint8_t if_type[16];
	uint8_t if_instance[16];
	uint8_t reserved[16];
	uint16_t chn_flags;
	uint16_t mmio_megabytes;
	uint8_t user_def[120];
	uint16_t sub_channel_index;
	uint16_t reserved3;
	uint32_t child_relid;
	uint8_t monitorid;
	uint8_t monitor_allocated;
	uint16_t is_dedicated_interrupt;
	uint32_t connection_id;
};
_Static_assert(sizeof(struct offer_channel) == 196, "OFFERCHANNEL");

struct PACKED gpadl_header {
	struct message_header header;
	uint32_t child_relid;
	uint32_t gpadl;
	uint16_t range_buflen;
	uint16_t rangecount;
	uint32_t byte_count;
	uint32_t byte_offset;
	uint64_t pfn[26];
};
_Static_assert(sizeof(struct gpadl_header) == 236, "GPADL_HEADER");

struct PACKED gpadl_body {
	struct message_header header;
	uint32_t msgnumber;
	uint32_t gpadl;
	uint64_t pfn[28];
};
_Static_assert(sizeof(struct gpadl_body) == 240, "GPADL_BODY");

/* GPADL_CREATED (gpadl, status) and OPENCHANNEL_RESULT (openid, status). */
struct PACKED result_message {
	struct message_header header;
	uint32_t child_relid;
	uint32_t handle;
	uint32_t status;
};
_Static_assert(sizeof(struct result_message) == 20, "GPADL_CREATED");

struct PACKED open_channel {
	struct message_header header;
	uint32_t child_relid;
	uint32_t openid;
	uint32_t ringbuffer_gpadlhandle;
	uint32_t target_vp;
	uint32_t downstream_ringbuffer_pageoffset;
	uint8_t userdata[120];
};
_Static_assert(sizeof(struct open_channel) == 148, "OPENCHANNEL");

struct PACKED gpadl_teardown {
	struct message_header header;
	uint32_t child_relid;
	uint32_t gpadl;
};
_Static_assert(sizeof(struct gpadl_teardown) == 16, "GPADL_TEARDOWN");

/* CLOSECHANNEL and RELID_RELEASED (a relid), GPADL_TORNDOWN (a handle). */
struct PACKED number_message {
	struct message_header header;
	uint32_t number;
};
_Static_assert(sizeof(struct number_message) == 12, "RELID_RELEASED");

#endif
